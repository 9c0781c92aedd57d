"""Learning rate and decay of single parameters: rules by name, and a decay over the layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from fasttrain.config.errors import Problem, UserError
from fasttrain.config.schema.optimizer import OptimizerSection, ParameterRule
from fasttrain.core.interfaces import DECAYED_ROLES, Role
from fasttrain.core.parameter_names import fitting

_LAYER = re.compile(r"\.(\d+)\.")  # as in model.layers.3.mlp.up_proj.weight


@dataclass(frozen=True)
class Rates:
    """How a parameter is stepped. `label` says what makes it differ; empty where nothing does."""

    label: str
    learning_rate: float
    weight_decay: float


class ParameterRules:
    """What `optimizer:` asks of each trained parameter of a model, `roles` by their names.

    UserError where a rule fits none, or sets the decay of such only as never decay; where two rules
    want different values of one parameter; and where `layer_decay` finds no layers.
    """

    def __init__(
        self, settings: OptimizerSection, model: nn.Module, roles: Mapping[str, Role]
    ) -> None:
        self._settings = settings
        self._roles = roles
        self._rules: dict[str, list[ParameterRule]] = {name: [] for name in roles}
        for index, rule in enumerate(settings.rules):
            self._add(rule, model, key=f"optimizer.rules[{index}]")
        self._layers = 0 if settings.layer_decay is None else _count_layers(model)

    def rates(self, name: str) -> Rates:
        """Of one parameter."""
        settings, decays = self._settings, self._roles[name] in DECAYED_ROLES
        layer_label, share = self._layer(name)
        base = settings.learning_rate * share
        rate = self._value(name, "learning rate", lambda rule: _learning_rate(rule, base), base)
        decay = self._value(name, "decay", lambda rule: rule.weight_decay, settings.weight_decay)
        labels = dict.fromkeys((layer_label, *(_shown(rule) for rule in self._rules[name])))
        return Rates(" · ".join(filter(None, labels)), rate, decay if decays else 0.0)

    def _add(self, rule: ParameterRule, model: nn.Module, *, key: str) -> None:
        found = {
            name: None for glob in rule.match for name in fitting(model, glob, key=f"{key}.match")
        }
        for name in found:
            self._rules[name].append(rule)
        if rule.weight_decay and not any(self._roles[name] in DECAYED_ROLES for name in found):
            raise UserError(
                Problem(
                    key=f"{key}.weight_decay",
                    what=f"'{_shown(rule)}' fits only norms, biases and embeddings, which never "
                    f"decay (got {rule.weight_decay:g}).",
                    hint="Drop it, or match matrices.",
                )
            )

    def _value(
        self,
        name: str,
        what: str,
        of: Callable[[ParameterRule], float | None],
        otherwise: float,
    ) -> float:
        """What the rules of a parameter agree on; `otherwise` where none says anything."""
        wanted = {rule: value for rule in self._rules[name] if (value := of(rule)) is not None}
        if len(set(wanted.values())) > 1:
            listed = " and ".join(f"'{_shown(rule)}' ({v:g})" for rule, v in wanted.items())
            raise UserError(
                Problem(
                    key="optimizer.rules",
                    what=f"{listed} want different values of one {what}: that of {name}.",
                    hint="Make one of them narrower, or the two alike.",
                )
            )
        return next(iter(wanted.values()), otherwise)

    def _layer(self, name: str) -> tuple[str, float]:
        """The layer of a parameter, and its share of the learning rate."""
        decay = self._settings.layer_decay
        if decay is None:
            return "", 1.0
        if self._roles[name] == "embeddings":
            return "layer 0", decay**self._layers
        found = _LAYER.search(name)
        if found is None:
            return "", 1.0
        number = int(found[1]) + 1
        return f"layer {number}", decay ** (self._layers - number)


def _learning_rate(rule: ParameterRule, base: float) -> float | None:
    if rule.learning_rate_scale is not None:
        return base * rule.learning_rate_scale
    return rule.learning_rate


def _shown(rule: ParameterRule) -> str:
    return ", ".join(rule.match)


def _count_layers(model: nn.Module) -> int:
    """One more than the largest number in a parameter's name that stands first in it."""
    numbers = [int(found[1]) for n, _ in model.named_parameters() if (found := _LAYER.search(n))]
    if not numbers:
        raise UserError(
            Problem(
                key="optimizer.layer_decay",
                what="the model's layers have no numbers in their parameters' names.",
                hint="Use optimizer.rules instead.",
            )
        )
    return max(numbers) + 1
