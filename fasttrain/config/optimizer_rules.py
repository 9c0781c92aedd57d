"""Rules of `optimizer:` that span keys."""

from __future__ import annotations

from collections.abc import Iterator

from fasttrain.config.errors import Problem
from fasttrain.config.schema.root import TrainConfig


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
