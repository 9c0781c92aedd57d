"""The output layer, which a fused loss can stand in for together with the loss of its logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from fasttrain.core.batch import BatchProfile
from fasttrain.model.language_model import HFLanguageModel
from fasttrain.model.transforms.sites.site import NotASite


@dataclass(frozen=True)
class HeadSite:
    """An output layer, a linear map to logits, and the loss of them."""

    op: ClassVar[str] = "linear_cross_entropy"
    path: str
    classes: int
    width: int

    def facts(self, profile: BatchProfile) -> dict[str, Any]:
        rows = profile.supervised_tokens or profile.tokens
        return {"classes": self.classes, "width": self.width, "rows": rows}

    def put(self, model: nn.Module, backend: str) -> None:
        """Make this model's losses fasttrain_kernels.linear_cross_entropy on `backend`."""
        assert isinstance(model, HFLanguageModel)
        model.loss_backend = backend


def find_heads(model: nn.Module) -> tuple[list[HeadSite], list[NotASite]]:
    """The output layer of a language model whose head is known, if a fused loss can stand in for it
    and for what follows."""
    if not isinstance(model, HFLanguageModel):
        return [], []
    layer = model.head.layer
    path = next(name for name, module in model.named_modules() if module is layer)
    reason = model.head.why_not_fused()
    if reason is not None:
        return [], [NotASite(path, reason)]
    classes, width = model.head.weight.shape
    return [HeadSite(path, classes, width)], []
