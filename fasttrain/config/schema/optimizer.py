"""`optimizer:`"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fasttrain.config.schema.base import (
    ComponentSection,
    Floats2,
    NonNegativeFloat,
    PositiveFloat,
    Section,
    StringOrStrings,
    entries,
)


class ParameterRule(Section):
    """What is different for the parameters whose names fit."""

    match: StringOrStrings
    """Globs of parameter names, such as `model.layers.0.*`; `*` crosses dots."""
    learning_rate: PositiveFloat | None = None
    """Their peak learning rate."""
    learning_rate_scale: PositiveFloat | None = None
    """Instead: their share of optimizer.learning_rate."""
    weight_decay: NonNegativeFloat | None = None
    """Decay of the matrices among them."""


class OptimizerSection(ComponentSection):
    """What every optimizer section has."""

    learning_rate: PositiveFloat = 2e-5
    """Peak learning rate; the scheduler scales it."""
    weight_decay: NonNegativeFloat = 0.0
    """Decay of matrices. Norms, biases and embeddings are never decayed."""
    rules: Annotated[tuple[ParameterRule, ...], entries] = ()
    """What is different for some parameters, by their names."""
    layer_decay: Annotated[PositiveFloat, Field(le=1)] | None = None
    """The learning rate of layer i of n (the first is 1) is times layer_decay^(n - i); embeddings
    count as layer 0, what belongs to no layer as the last."""


class AdamWConfig(OptimizerSection):
    """AdamW (arXiv 1711.05101), torch's fused implementation."""

    type: Literal["adamw"] = "adamw"
    betas: Floats2 = (0.9, 0.999)
    """Decay rates of the first and the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
