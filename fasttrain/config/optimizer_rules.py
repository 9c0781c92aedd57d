"""Rules of `optimizer:` that span keys, and the packages that optimizers need."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from fasttrain.config.errors import Problem
from fasttrain.config.schema.optimizer import (
    BitsandbytesAdamWConfig,
    OptimizerSection,
    ScheduleFreeAdamWConfig,
    TorchaoAdamWConfig,
)
from fasttrain.config.schema.root import TrainConfig
from fasttrain.config.schema.scheduler import ConstantConfig

# Optimizers of other packages: what is imported, which is what pip installs, too.
PACKAGES: dict[type[OptimizerSection], str] = {
    ScheduleFreeAdamWConfig: "schedulefree",
    TorchaoAdamWConfig: "torchao",
    BitsandbytesAdamWConfig: "bitsandbytes",
}


def check_parameter_rules(config: TrainConfig) -> Iterator[Problem]:
    """A rule fits something by name, changes something, and gives a learning rate once."""
    for index, rule in enumerate(config.optimizer.rules):
        key = f"optimizer.rules[{index}]"
        if not rule.match:
            hint = "Name parameters, such as `model.layers.0.*`."
            yield Problem("no globs (got an empty list).", key=f"{key}.match", hint=hint)
        if rule.learning_rate is not None and rule.learning_rate_scale is not None:
            what = f"excludes learning_rate_scale (got {rule.learning_rate:g} and "
            what += f"{rule.learning_rate_scale:g})."
            yield Problem(what, key=f"{key}.learning_rate", hint="Keep one.")
        values = (rule.learning_rate, rule.learning_rate_scale, rule.weight_decay)
        if all(value is None for value in values):
            hint = "Set learning_rate, learning_rate_scale or weight_decay, or drop the rule."
            yield Problem("changes nothing.", key=key, hint=hint)


def check_gradient_release(config: TrainConfig) -> Iterator[Problem]:
    """Steps in the backward pass see one gradient at a time, of one micro-batch."""
    if not getattr(config.optimizer, "gradient_release", False):
        return
    key = "optimizer.gradient_release"
    if config.max_grad_norm > 0:
        what = "can't clip by the norm of all gradients (got max_grad_norm: "
        what += f"{config.max_grad_norm:g})."
        yield Problem(what, key=key, hint="Set max_grad_norm: 0.")
    steps = config.gradient_accumulation_steps or 1
    packs = config.global_batch_size or config.micro_batch_size
    if steps > 1 or packs > config.micro_batch_size:
        what = "can't add up gradients over the micro-batches of a step."
        hint = "Drop gradient_accumulation_steps, and global_batch_size where it is larger than "
        yield Problem(what, key=key, hint=f"{hint}micro_batch_size.")


def check_package(config: TrainConfig) -> Iterator[Problem]:
    """The package of an optimizer is there."""
    package = PACKAGES.get(type(config.optimizer))
    if package is not None and importlib.util.find_spec(package) is None:
        yield Problem(
            f"'{config.optimizer.type}' needs the package {package}, which is not installed.",
            key="optimizer.type",
            hint=f"pip install {package}, or take another optimizer.",
        )


def check_resumable(config: TrainConfig) -> Iterator[Problem]:
    """What an optimizer keeps can be put back from a checkpoint."""
    reason = _why_not_resumable(config.optimizer)
    if reason is None:
        return
    for index, section in enumerate(config.checkpoint):
        if section.type == "sharded":
            yield Problem(
                f"'sharded' can't keep the state of '{config.optimizer.type}': {reason}.",
                key=f"checkpoint[{index}]",
                hint="Take another optimizer, or write the model alone: checkpoint: [huggingface].",
            )


def _why_not_resumable(optimizer: OptimizerSection) -> str | None:
    if isinstance(optimizer, TorchaoAdamWConfig):
        return "it is in tensors of classes of torchao's own"
    if isinstance(optimizer, BitsandbytesAdamWConfig) and optimizer.paged:
        return "with `paged` it is in pages of the driver's, and would come back outside them"
    return None


def schedule_notes(config: TrainConfig) -> Iterator[str]:
    """A schedule that works against the optimizer."""
    if isinstance(config.optimizer, ScheduleFreeAdamWConfig) and not isinstance(
        config.scheduler, ConstantConfig
    ):
        name = config.scheduler.type
        yield f"schedule_free_adamw is made for scheduler.type=constant, and it is {name}"
