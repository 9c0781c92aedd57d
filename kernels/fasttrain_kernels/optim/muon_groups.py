"""Which parameters of a model are Muon's."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any

from torch import Tensor, nn

from fasttrain_kernels.optim.groups import decay_groups


def hidden_matrices(model: nn.Module, *, adamw: Iterable[str] = ()) -> set[nn.Parameter]:
    """The trainable parameters that Muon is for: (m, n) and (E, m, n), between input and output.

    Not those of embeddings, of an output layer, nor what a glob of `adamw` fits by its name. An
    output layer is what `model.get_output_embeddings()` says, and any layer that has as many
    outputs as an embedding has rows.
    """
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    others: set[Tensor] = {p for module in embeddings for p in module.parameters(recurse=False)}
    vocabularies = {module.num_embeddings for module in embeddings}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features in vocabularies:
            others.add(module.weight)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        others.update(output.parameters(recurse=False))
    globs = tuple(adamw)
    return {
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.dim() in (2, 3) and parameter not in others
        if not any(fnmatch(name, glob) for glob in globs)
    }


def muon_groups(
    model: nn.Module,
    weight_decay: float = 0.1,
    *,
    adamw_lr: float | None = None,
    adamw: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """The trainable parameters of a model as parameter groups for Muon.

    Hidden matrices are its own, the rest AdamW's, which decays matrices other than embeddings.
    adamw_lr: the rest's learning rate; None for the optimizer's. adamw: globs of names of matrices
    that AdamW steps too, such as "*.router.*". ValueError where no hidden matrix is trainable.
    """
    hidden = hidden_matrices(model, adamw=adamw)
    if not hidden:
        raise ValueError(
            "Muon on 0 parameters: none of the trainable ones is a hidden matrix (m, n) or "
            "(E, m, n); use AdamW"
        )
    groups: list[dict[str, Any]] = [
        {
            "name": "hidden matrices",
            "params": [(n, p) for n, p in model.named_parameters() if p in hidden],
            "weight_decay": weight_decay,
            "muon": True,
        }
    ]
    for group in decay_groups(model, weight_decay):
        rest = [(name, p) for name, p in group["params"] if p not in hidden]
        if rest:
            rate = {} if adamw_lr is None else {"lr": adamw_lr}
            groups.append({**group, "params": rest, "muon": False, **rate})
    return groups
