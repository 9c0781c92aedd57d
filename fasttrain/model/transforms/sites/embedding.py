"""Token embeddings: a table of rows, in Gemma multiplied by a constant."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from fasttrain_kernels import embedding
from torch import Tensor, nn

from fasttrain.core.batch import BatchProfile
from fasttrain.model.transforms.sites.site import (
    NotASite,
    is_patched,
    only,
    patch_forward,
    random_tensor,
)

SCALE = "embed_scale"  # what transformers calls the constant, a buffer


@dataclass(frozen=True)
class EmbeddingSite:
    """y = weight[ids], or that times the module's embed_scale."""

    op: ClassVar[str] = "embedding"
    path: str
    width: int
    vocabulary: int
    scaled: bool

    def facts(self, profile: BatchProfile) -> dict[str, Any]:
        return {"width": self.width, "vocabulary": self.vocabulary, "rows": profile.tokens}

    def put(self, model: nn.Module, backend: str) -> None:
        scaled = self.scaled

        def forward(self: nn.Module, *args: Tensor, **named: Tensor) -> Tensor:
            assert isinstance(self, nn.Embedding)
            ids = only(args, named)
            y = embedding(ids, self.weight, padding_idx=self.padding_idx, backend=backend)
            return y * self.get_buffer(SCALE).to(self.weight.dtype) if scaled else y

        patch_forward(model.get_submodule(self.path), forward)


def find_embeddings(model: nn.Module) -> tuple[list[EmbeddingSite], list[NotASite]]:
    """Every embedding of `model` that is a table and no more."""
    sites: list[EmbeddingSite] = []
    others: list[NotASite] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.Embedding):
            continue
        reason = _why_not(module)
        if reason is None:
            scaled = type(module).forward is not nn.Embedding.forward
            size = (module.embedding_dim, module.num_embeddings)
            sites.append(EmbeddingSite(path, *size, scaled))
        else:
            others.append(NotASite(path, f"{type(module).__name__}: {reason}"))
    return sites, others


def _why_not(module: nn.Embedding) -> str | None:
    if is_patched(module):
        return "its forward has been patched"
    options = ("max_norm", "scale_grad_by_freq", "sparse")
    set_ones = [name for name in options if getattr(module, name)]
    if set_ones:
        return f"{', '.join(set_ones)} is set"
    if type(module).forward is nn.Embedding.forward or _is_scaled(module):
        return None
    return "it computes something else than a look-up"


def _is_scaled(module: nn.Embedding) -> bool:
    """Whether a twin with a tiny table gives its rows times embed_scale."""
    if not isinstance(getattr(module, SCALE, None), Tensor):
        return False
    twin = copy.copy(module)
    vars(twin)["_parameters"] = {"weight": nn.Parameter(random_tensor((5, 3), seed=1))}
    vars(twin)["_buffers"] = {SCALE: torch.tensor(1.7)}
    vars(twin)["padding_idx"] = None
    ids = torch.tensor([3, 0, 4])
    try:
        with torch.no_grad():
            return torch.equal(twin(ids), twin.weight[ids] * torch.tensor(1.7))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
