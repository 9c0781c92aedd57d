"""fasttrain: train language models from one YAML file, with compiled kernels of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fasttrain.core.events import Callback, Result

__version__ = "0.1.0"


def run(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Train as a config says, as `fasttrain run` does.

    `source` is a YAML file or the config as a mapping; `overrides` are `key.path=value` strings or
    a mapping of key paths. `callbacks` are added after the config's. Raises
    `fasttrain.config.errors.UserError` with every problem found.
    """
    from fasttrain.config.load import load

    loaded = load(source, overrides)
    from fasttrain.core import build  # after the config is known to be right: it imports torch

    return build.run(loaded, callbacks=callbacks)
