"""Puts the kernels of a plan into the model, one site at a time, and back out again."""

from __future__ import annotations

from torch import nn

from fasttrain.config.schema.model import KernelsTransformConfig
from fasttrain.core.interfaces import LanguageModel, Transform
from fasttrain.core.kernel_plan import EAGER, OPTIMIZER, KernelPlan
from fasttrain.model.language_model import HFLanguageModel
from fasttrain.model.transforms.sites import packed_attention
from fasttrain.model.transforms.sites.search import SEARCHES
from fasttrain.model.transforms.sites.site import unpatch_forward


class KernelsTransform(Transform):
    """Applies the plan as it was decided; a site served by "eager" stays as the model has it."""

    Config = KernelsTransformConfig

    def apply(self, model: LanguageModel, *, plan: KernelPlan) -> LanguageModel:
        served = {
            (site.op, site.path): site.requested
            for site in plan.sites
            if site.backend != EAGER and site.path != OPTIMIZER
        }
        for search in SEARCHES:
            if any(op == search.op for op, _ in served):
                for site in search.find(model)[0]:
                    backend = served.pop((site.op, site.path), None)
                    if backend is not None:
                        site.put(model, backend)
        assert not served, f"{served} is not in the model"
        return model


def revert(model: nn.Module) -> None:
    """Take every kernel out again."""
    if isinstance(model, HFLanguageModel):
        model.loss_backend = None
    for module in model.modules():
        unpatch_forward(module)
        packed_attention.take_out(module)
