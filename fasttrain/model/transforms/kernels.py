"""Puts the kernels of a plan into the model: one module instance at a time, and back out again.

No class and no global is touched, so that two models in one process can differ.
"""

from __future__ import annotations

from types import MethodType

from fasttrain_kernels import rms_norm
from torch import Tensor, nn

from fasttrain.config.schema.model import KernelsTransformConfig
from fasttrain.core.interfaces import LanguageModel, Transform
from fasttrain.core.kernel_plan import KernelPlan
from fasttrain.model.language_model import HFLanguageModel
from fasttrain.model.transforms.sites import HeadSite, NormSite, find_heads, find_rms_norms

EAGER = "eager"


class KernelsTransform(Transform):
    """Applies the plan as it was decided; a site served by "eager" stays as the model has it."""

    Config = KernelsTransformConfig

    def apply(self, model: LanguageModel, *, plan: KernelPlan) -> LanguageModel:
        served = [site for site in plan.sites if site.backend != EAGER]
        if served:
            norms = {site.path: site for site in find_rms_norms(model)[0]}
            heads = {site.path for site in find_heads(model)[0]}
            for site in served:
                if site.op == HeadSite.op and site.path in heads:
                    put_fused_loss(model, site.backend)
                else:
                    found = site.op == NormSite.op and site.path in norms
                    assert found, f"{site} is not in the model"
                    put_rms_norm(model.get_submodule(site.path), norms[site.path], site.backend)
        return model


def put_fused_loss(model: nn.Module, backend: str) -> None:
    """Make this model's losses fasttrain_kernels.linear_cross_entropy on `backend`."""
    assert isinstance(model, HFLanguageModel)
    model.loss_backend = backend


def put_rms_norm(module: nn.Module, site: NormSite, backend: str) -> None:
    """Make this instance run fasttrain_kernels.rms_norm on `backend`."""

    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        weight = self.get_parameter("weight")
        y = rms_norm(hidden_states, weight, site.eps, style=site.style, backend=backend)
        assert isinstance(y, Tensor)
        return y

    forward.is_fasttrain_kernel = True  # type: ignore[attr-defined]
    assert "forward" not in vars(module), "somebody has patched this module before"
    # A bound method, not a closure over the module: copy.deepcopy then binds it to the copy.
    module.forward = MethodType(forward, module)


def revert(model: nn.Module) -> None:
    """Take every kernel out again."""
    if isinstance(model, HFLanguageModel):
        model.loss_backend = None
    for module in model.modules():
        if getattr(vars(module).get("forward"), "is_fasttrain_kernel", False):
            del module.forward
