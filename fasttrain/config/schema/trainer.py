"""`trainer:` the options of the method that the top-level `type` names."""

from __future__ import annotations

from typing import Literal

from fasttrain.config.schema.base import ComponentSection


class TrainerSection(ComponentSection):
    """What every method's options have."""


class SFTConfig(TrainerSection):
    """Supervised fine-tuning: the loss counts the assistant's tokens."""

    type: Literal["sft"] = "sft"


class CausalConfig(TrainerSection):
    """Causal language modelling: the loss counts every token."""

    type: Literal["causal"] = "causal"
