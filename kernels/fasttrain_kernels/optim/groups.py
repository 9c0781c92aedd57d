"""Which parameters decay."""

from __future__ import annotations

from typing import Any

from torch import nn


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters of a model as two parameter groups for an optimizer.

    Decayed are matrices (two dimensions and more) that aren't embeddings; norms, biases and
    embeddings are not. A tied weight counts once, and as an embedding. Parameters come with their
    names; empty groups are left out. ValueError where nothing is trainable.
    """
    embeddings = {
        parameter
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    decayed: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() >= 2 and parameter not in embeddings
            (decayed if decays else others).append((name, parameter))
    groups: list[dict[str, Any]] = [
        {"name": "decayed", "params": decayed, "weight_decay": weight_decay},
        {"name": "not decayed", "params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("none of the model's parameters is trainable")
    return groups
