"""The ops of the optimizer's step as sites, which are no modules of the model."""

from __future__ import annotations

from collections import Counter
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

    trained: tuple[nn.Parameter, ...]
    op: ClassVar[str]

    @property
    def path(self) -> str:
        return OPTIMIZER

    def facts(self, profile: BatchProfile) -> dict[str, Any]:
        elements = sum(parameter.numel() for parameter in self.trained)
        return {**profile.optimizer[self.op], "rows": elements}

    def put(self, model: nn.Module, backend: str) -> None:
        raise AssertionError("the optimizer's factory reads the plan")


class StepSite(_Site):
    op = "optimizer_step"


class NormSite(_Site):
    op = "grad_norm"


class NewtonSchulzSite(_Site):
    """Its facts are those of the shape that most matrices have."""

    op = "newton_schulz"

    def facts(self, profile: BatchProfile) -> dict[str, Any]:
        shapes = Counter(
            tuple(sorted(p.shape[-2:])) for p in self.trained if p.dim() >= 2 and min(p.shape) > 1
        )
        (short, long), count = (shapes.most_common(1) or [((1, 1), 0)])[0]
        return {**profile.optimizer[self.op], "short": short, "long": long, "rows": count}


def optimizer_searches(profile: BatchProfile) -> tuple[Search, ...]:
    """A search for each op; nothing is found for an optimizer whose step is its library's own."""

    def search(site: type[_Site]) -> Search:
        def find(model: nn.Module) -> tuple[Sequence[Site], Sequence[NotASite]]:
            facts = profile.optimizer.get(site.op)
            return ([] if facts is None else [site(_trained(model))]), []

        return Search(site.op, "optimizer with a step of fasttrain's own", find)

    return tuple(map(search, (StepSite, NormSite, NewtonSchulzSite)))


def _trained(model: nn.Module) -> tuple[nn.Parameter, ...]:
    return tuple(parameter for parameter in model.parameters() if parameter.requires_grad)
