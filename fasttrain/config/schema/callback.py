"""`callbacks:` is a list of names or mappings with a `type`."""

from __future__ import annotations

from typing import Literal

from fasttrain.config.schema.base import (
    ComponentSection,
    PositiveFloat,
    PositiveInt,
    Strings,
)


class CallbackSection(ComponentSection):
    """What every callback section has."""


class ConsoleConfig(CallbackSection):
    """The first screen, the progress line and the summary."""

    type: Literal["console"] = "console"
    style: Literal["auto", "rich", "plain"] = "auto"
    """`rich` redraws one line, `plain` prints one per logged step. `auto`: rich on a terminal."""


class MetricsFileConfig(CallbackSection):
    """metrics.jsonl: a line per logged step and per evaluation."""

    type: Literal["metrics_file"] = "metrics_file"


class LossPlotConfig(CallbackSection):
    """loss.png, drawn from metrics.jsonl when training ends."""

    type: Literal["loss_plot"] = "loss_plot"


class TensorBoardConfig(CallbackSection):
    """Scalars for TensorBoard, in `tensorboard/` of the run directory."""

    type: Literal["tensorboard"] = "tensorboard"


class KernelSelectionConfig(CallbackSection):
    """Decides which kernel serves each site of the model; prints the table, writes kernels.json."""

    type: Literal["kernel_selection"] = "kernel_selection"


class NonFiniteGuardConfig(CallbackSection):
    """What happens when the loss or the gradient norm is not finite. The step is never applied."""

    type: Literal["nonfinite_guard"] = "nonfinite_guard"
    policy: Literal["stop", "skip"] = "stop"
    """`stop`: end the run, the offending batch kept in `nonfinite/`. `skip`: go on."""
    max_skips: PositiveInt = 10
    """With `skip`: steps skipped in a row before the run stops all the same."""


class CanaryConfig(CallbackSection):
    """Computes a micro-batch now and then again with the kernels' references, and compares."""

    type: Literal["canary"] = "canary"
    every_steps: PositiveInt = 100
    """Steps between two comparisons: a micro-batch forward and backward, on kernels and on
    references."""
    policy: Literal["warn", "quarantine", "stop"] = "warn"
    """Beyond the bound: say so and name the culprit; also never use its kernel again on this
    machine; or end the run."""
    bound: PositiveFloat | None = None
    """Relative difference of loss or gradient. Default: 1e-3 in float32, 0.1 in 16 bits."""


class SamplesConfig(CallbackSection):
    """Lets the model write, before training, at evaluations and at the end."""

    type: Literal["samples"] = "samples"
    prompts: Strings = ()
    """What is asked. Default: prompts of the held-out data."""
    num_prompts: PositiveInt = 3
    """How many prompts are drawn from the held-out data where none are given."""
    max_new_tokens: PositiveInt = 48
    """Tokens written at most."""


class UnigramBaselineConfig(CallbackSection):
    """Compares the held-out loss with that of a unigram model of the training tokens."""

    type: Literal["unigram_baseline"] = "unigram_baseline"


class EarlyStoppingConfig(CallbackSection):
    """Stops when the held-out loss no longer falls."""

    type: Literal["early_stopping"] = "early_stopping"
    patience: PositiveInt = 3
    """Evaluations without a new best before the run stops."""
    min_delta: PositiveFloat = 1e-4
    """A new best must be lower by this much (nats per token)."""
