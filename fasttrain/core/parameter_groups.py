"""Which parameters are trained, and which of them decay."""

from __future__ import annotations

from torch import nn

from fasttrain.config.errors import Problem, UserError
from fasttrain.core.interfaces import ParameterGroup


def parameter_groups(
    model: nn.Module, *, learning_rate: float, weight_decay: float
) -> list[ParameterGroup]:
    """The trainable parameters in two groups, `decayed` and `not decayed`; no group is empty.

    Decayed are matrices (two dimensions and more) that aren't embeddings: norms and biases have one
    dimension. A tied weight counts once, under its first name, and as an embedding if it is one
    anywhere. UserError where nothing is trainable.
    """
    embeddings = {
        parameter
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    decayed: dict[str, nn.Parameter] = {}
    others: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() >= 2 and parameter not in embeddings
            (decayed if decays else others)[name] = parameter
    if not decayed and not others:
        raise UserError(
            Problem(
                key="model",
                what="none of its parameters is trainable.",
                hint="Leave weights unfrozen, or add adapters: model.transforms: [{type: lora}].",
            )
        )
    return [
        ParameterGroup(
            name=name,
            names=tuple(members),
            parameters=tuple(members.values()),
            weight_decay=decay,
            learning_rate=learning_rate,
        )
        for name, members, decay in (
            ("decayed", decayed, weight_decay),
            ("not decayed", others, 0.0),
        )
        if members
    ]
