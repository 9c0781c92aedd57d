"""`scheduler:` All count optimizer steps; warm-up is a line from 1/n at the first of its
n steps to 1 at its last."""

from __future__ import annotations

from typing import Literal

from fasttrain.config.schema.base import ComponentSection, Fraction, NonNegativeInt


class SchedulerSection(ComponentSection):
    """What every scheduler section has."""

    warmup_steps: NonNegativeInt | None = None
    """Steps of warm-up. Excludes warmup_ratio."""
    warmup_ratio: Fraction | None = None
    """Warm-up as a share of all steps. Excludes warmup_steps."""


class ConstantConfig(SchedulerSection):
    """Warm-up, then the peak rate."""

    type: Literal["constant"] = "constant"


class LinearConfig(SchedulerSection):
    """Warm-up, then a straight line down that reaches min_ratio just after the last step."""

    type: Literal["linear"] = "linear"
    min_ratio: Fraction = 0.0
    """Where the learning rate goes, as a share of the peak."""


class CosineConfig(SchedulerSection):
    """Warm-up, then half a cosine that reaches min_ratio just after the last step
    (arXiv 1608.03983)."""

    type: Literal["cosine"] = "cosine"
    min_ratio: Fraction = 0.0
    """Where the learning rate goes, as a share of the peak."""


class WsdConfig(SchedulerSection):
    """Warm-up, stable, decay: constant, then a straight line down (arXiv 2404.06395)."""

    type: Literal["wsd"] = "wsd"
    decay_ratio: Fraction = 0.1
    """Decay as a share of all steps."""
    min_ratio: Fraction = 0.0
    """Where the learning rate goes, as a share of the peak."""
