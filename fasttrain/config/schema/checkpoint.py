"""`checkpoint:` is a list; each entry says what is written and when."""

from __future__ import annotations

from typing import Literal

from fasttrain.config.schema.base import ComponentSection, PositiveInt


class CheckpointSection(ComponentSection):
    """What every checkpoint section has."""

    every_steps: PositiveInt | None = None
    """Write each n optimizer steps."""
    at_end: bool = True
    """Write when training ends."""


class ShardedCheckpointConfig(CheckpointSection):
    """Everything needed to go on exactly: model, optimizer, schedule, random states, data position.
    Written to `checkpoints/step-00000100/`; complete or absent, checked by sums when read."""

    type: Literal["sharded"] = "sharded"
    keep: PositiveInt = 2
    """How many of the newest stay; the best by evaluation loss always stays too."""


class HuggingFaceCheckpointConfig(CheckpointSection):
    """The model and tokenizer as transformers reads them, in `model/` (or, with LoRA, the adapters
    as peft reads them)."""

    type: Literal["huggingface"] = "huggingface"
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Dtype of the written weights. `auto`: as trained."""
