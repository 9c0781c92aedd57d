"""`fasttrain show-config`"""

from __future__ import annotations

from collections.abc import Sequence


def show_config(file: str, overrides: Sequence[str] = ()) -> None:
    """Print every value of a config with its origin. UserError where the config has problems."""
    from fasttrain.config.load import load
    from fasttrain.config.resolve import resolved_yaml

    loaded = load(file, overrides)
    for line in (*loaded.aliases_used, *(f"imported {name}" for name in loaded.imports)):
        print(f"# {line}")
    print(resolved_yaml(loaded), end="")
