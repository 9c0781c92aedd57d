"""`engine:` how an optimizer step runs."""

from __future__ import annotations

from typing import Literal

from fasttrain.config.schema.base import ComponentSection


class EngineSection(ComponentSection):
    """What every engine section has. `type: auto` resolves to one of the engines, with a reason."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it runs. `auto`: the GPU if there is one, else the CPU."""


class AutoEngineConfig(EngineSection):
    """The engine that fits the machine and the config."""

    type: Literal["auto"] = "auto"


class LocalEngineConfig(EngineSection):
    """One process, one device, plain PyTorch."""

    type: Literal["local"] = "local"
