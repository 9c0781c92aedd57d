"""The ops of the optimizer's step as sites, which are no modules of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from fasttrain.core.batch import BatchProfile
from fasttrain.core.kernel_plan import OPTIMIZER
from fasttrain.model.transforms.sites.search import Search
from fasttrain.model.transforms.sites.site import NotASite, Site


@dataclass(frozen=True)
class _Site:
    """One op of the step. The optimizer's factory puts the kernel in."""

    elements: int  # of all trained parameters
    op: ClassVar[str]

    @property
    def path(self) -> str:
        return OPTIMIZER

    def facts(self, profile: BatchProfile) -> dict[str, Any]:
        return {**profile.optimizer[self.op], "rows": self.elements}

    def put(self, model: nn.Module, backend: str) -> None:
        raise AssertionError("the optimizer's factory reads the plan")


class StepSite(_Site):
    op = "optimizer_step"


class NormSite(_Site):
    op = "grad_norm"


def optimizer_searches(profile: BatchProfile) -> tuple[Search, ...]:
    """A search for each op; nothing is found for an optimizer whose step is its library's own."""

    def search(site: type[_Site]) -> Search:
        def find(model: nn.Module) -> tuple[Sequence[Site], Sequence[NotASite]]:
            if site.op not in profile.optimizer:
                return [], []
            elements = sum(p.numel() for p in model.parameters() if p.requires_grad)
            return [site(elements)], []

        return Search(site.op, "optimizer with a step of fasttrain's own", find)

    return tuple(map(search, (StepSite, NormSite)))
