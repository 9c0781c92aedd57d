"""`fasttrain schema`"""

from __future__ import annotations

import json


def schema(file: str | None = None) -> None:
    """Print the JSON Schema of a config; with a config, that of its `imports` included."""
    from fasttrain.config.json_schema import config_schema
    from fasttrain.config.load import load

    if file is not None:
        load(file)
    print(json.dumps(config_schema(), indent=2, ensure_ascii=False))
