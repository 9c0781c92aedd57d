"""Which parameters are stepped alike: by what they are, and by the rules of `optimizer:`."""

from __future__ import annotations

from torch import nn

from fasttrain.config.schema.optimizer import OptimizerSection
from fasttrain.core.interfaces import ROLES, ParameterGroup, Role
from fasttrain.core.parameter_names import trained_parameters
from fasttrain.core.parameter_rules import ParameterRules, Rates


def parameter_groups(
    model: nn.Module, settings: OptimizerSection, *, head: nn.Parameter | None = None
) -> list[ParameterGroup]:
    """The trained parameters in groups of one role and one set of rates; no group is empty.

    `head` is the weight of the output layer. A tied weight counts once, under its first name, and
    as an embedding if it is one anywhere. Groups come in the order of the roles; within a role
    first what no rule changes, then with the larger learning rate first.

    UserError where nothing is trained, and what ParameterRules refuses.
    """
    trained = trained_parameters(model)
    roles = _roles(model, trained, head)
    rules = ParameterRules(settings, model, roles)
    members: dict[tuple[Role, Rates], list[str]] = {}
    for name, role in roles.items():
        members.setdefault((role, rules.rates(name)), []).append(name)
    return [
        ParameterGroup(
            name=f"{role} · {rates.label}" if rates.label else role,
            role=role,
            names=tuple(names),
            parameters=tuple(trained[name] for name in names),
            weight_decay=rates.weight_decay,
            learning_rate=rates.learning_rate,
        )
        for (role, rates), names in sorted(members.items(), key=lambda item: _place(*item[0]))
    ]


def _roles(
    model: nn.Module, trained: dict[str, nn.Parameter], head: nn.Parameter | None
) -> dict[str, Role]:
    """What each parameter is. Learnt positions are embeddings as tokens are."""
    embeddings = {
        parameter
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }

    def role(parameter: nn.Parameter) -> Role:
        if parameter in embeddings:
            return "embeddings"
        if parameter.dim() < 2:
            return "vectors"
        return "head" if parameter is head else "matrices"

    return {name: role(parameter) for name, parameter in trained.items()}


def _place(role: Role, rates: Rates) -> tuple[int, bool, float]:
    return ROLES.index(role), bool(rates.label), -rates.learning_rate
