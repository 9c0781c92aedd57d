"""`optimizer:`"""

from __future__ import annotations

from typing import Literal

from fasttrain.config.schema.base import (
    ComponentSection,
    Floats2,
    NonNegativeFloat,
    PositiveFloat,
)


class OptimizerSection(ComponentSection):
    """What every optimizer section has."""

    learning_rate: PositiveFloat = 2e-5
    """Peak learning rate; the scheduler scales it."""
    weight_decay: NonNegativeFloat = 0.0
    """Decay of matrices. Norms, biases and embeddings are never decayed."""


class AdamWConfig(OptimizerSection):
    """AdamW (arXiv 1711.05101), torch's fused implementation."""

    type: Literal["adamw"] = "adamw"
    betas: Floats2 = (0.9, 0.999)
    """Decay rates of the first and the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
