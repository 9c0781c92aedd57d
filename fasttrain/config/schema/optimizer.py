"""`optimizer:`"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fasttrain.config.schema.base import (
    ComponentSection,
    Float,
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


class OnePassSection(OptimizerSection):
    """What the optimizers with kernels of fasttrain's own have."""

    moments: Literal["float32", "bfloat16", "8bit"] = "float32"
    """How moments are kept: 4, 2 or 1 bytes each. Fewer bits are rounded at random."""
    rounding: Literal["stochastic", "kahan"] = "stochastic"
    """How weights are kept with `precision: bf16`: rounded at random, or with what rounding lost
    beside them (2 bytes more)."""
    gradient_release: bool = False
    """Step each weight in the backward pass and drop its gradient, which saves the memory of all of
    them. Needs max_grad_norm: 0 and one micro-batch a step."""


class AdamWConfig(OnePassSection):
    """AdamW (arXiv 1711.05101)."""

    type: Literal["adamw"] = "adamw"
    betas: Floats2 = (0.9, 0.999)
    """Decay rates of the first and the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""


class LionConfig(OnePassSection):
    """Lion (arXiv 2302.06675): one moment, steps of one size. A third to a tenth of AdamW's
    learning rate is usual, with as many times its decay."""

    type: Literal["lion"] = "lion"
    learning_rate: PositiveFloat = 5e-6
    """Peak learning rate; the scheduler scales it."""
    betas: Floats2 = (0.9, 0.99)
    """The share of the moment in the direction; its decay rate."""


class SGDConfig(OnePassSection):
    """Stochastic gradient descent, as torch.optim.SGD; decay is added to the gradient."""

    type: Literal["sgd"] = "sgd"
    learning_rate: PositiveFloat = 1e-2
    """Peak learning rate; the scheduler scales it."""
    momentum: Annotated[NonNegativeFloat, Field(lt=1)] = 0.9
    """The share of the former direction that is kept. 0: no state."""
    nesterov: bool = False
    """Look ahead by the momentum (Nesterov)."""


class AdafactorConfig(OptimizerSection):
    """Adafactor (arXiv 1804.04235) by torch: of a matrix only row and column means of the second
    moment are kept. Steps are shares of a weight's size: at most learning_rate, at step t 1/√t."""

    type: Literal["adafactor"] = "adafactor"
    learning_rate: PositiveFloat = 1e-2
    """Peak learning rate, as a share of the root mean square of each weight."""
    beta2_decay: Annotated[Float, Field(le=0)] = -0.8
    """The second moment's decay rate at step t is 1 - t^beta2_decay."""
    clip_threshold: Annotated[PositiveFloat, Field(ge=1)] = 1.0
    """Updates of a larger root mean square are scaled down to it."""
    min_scale: PositiveFloat = 1e-3
    """The least root mean square that a weight counts with."""


class ScheduleFreeAdamWConfig(OptimizerSection):
    """Schedule-free AdamW (arXiv 2405.15682), package schedulefree: evaluation, samples and export
    use an average of the weights, so `scheduler: constant` fits it, with a warm-up."""

    type: Literal["schedule_free_adamw"] = "schedule_free_adamw"
    betas: Floats2 = (0.9, 0.999)
    """The share of the average in the weights of training; decay rate of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""


class TorchaoAdamWConfig(OptimizerSection):
    """AdamW whose moments are kept in few bits, by torchao; compiled at the first step."""

    type: Literal["torchao_adamw"] = "torchao_adamw"
    bits: Literal[8, 4, "fp8"] = 8
    """Of each moment's element. `fp8`: floating point."""
    betas: Floats2 = (0.9, 0.999)
    """Decay rates of the first and the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    random_rounding: bool = False
    """Weights in bf16 are rounded at random, so that small updates count on average."""


class BitsandbytesAdamWConfig(OptimizerSection):
    """AdamW by bitsandbytes, with moments of 8 bits (arXiv 2110.02861) or in pages."""

    type: Literal["bitsandbytes_adamw"] = "bitsandbytes_adamw"
    bits: Literal[8, 32] = 8
    """Of each moment's element."""
    paged: bool = False
    """Moments in memory that the driver moves to the CPU while the GPU is short of it."""
    betas: Floats2 = (0.9, 0.999)
    """Decay rates of the first and the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
