"""RMS norms: transformers has a class of its own for that of nearly every architecture.

They are found by their structure, one weight vector and an epsilon, and accepted when a copy, run
on a few random rows, computes what the kernels' definition computes.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from fasttrain_kernels import rms_norm
from fasttrain_kernels.ops.rms_norm import reference
from torch import Tensor, nn

from fasttrain.core.batch import BatchProfile
from fasttrain.model.transforms.sites.site import (
    NotASite,
    is_patched,
    only,
    patch_forward,
    random_tensor,
)

EPSILON_NAMES = ("variance_epsilon", "eps", "epsilon")

# (rows, weight): with both in bf16 the styles differ by where they round, with bf16 rows and fp32
# weights by the dtype they return.
DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
)
ROUNDINGS = 4  # by which the same formula may differ, in units of the last place of a row's largest
ROW_SCALES = (1.0, 30.0, 1e-3, 1e-4)  # the small ones show where epsilon is added, and which


@dataclass(frozen=True)
class NormSite:
    """An RMS norm: y = x / sqrt(mean(x²) + eps) · weight, as fasttrain_kernels.rms_norm has it."""

    op: ClassVar[str] = "rms_norm"
    path: str
    width: int
    eps: float
    style: str
    weight_dtype: torch.dtype

    def facts(self, profile: BatchProfile) -> dict[str, Any]:
        return {
            "width": self.width,
            "weight_dtype": self.weight_dtype,
            "style": self.style,
            "rows": profile.tokens,
        }

    def put(self, model: nn.Module, backend: str) -> None:
        eps, style = self.eps, self.style

        def forward(self: nn.Module, *args: Tensor, **named: Tensor) -> Tensor:
            weight = self.get_parameter("weight")
            y = rms_norm(only(args, named), weight, eps, style=style, backend=backend)
            assert isinstance(y, Tensor)
            return y

        patch_forward(model.get_submodule(self.path), forward)


def find_rms_norms(model: nn.Module) -> tuple[list[NormSite], list[NotASite]]:
    """Every RMS norm of `model`, and what only looks like one. Weights are not read: a model on the
    meta device gives the same answer."""
    sites: list[NormSite] = []
    others: list[NotASite] = []
    for path, module in model.named_modules():
        if not _has_structure(module):
            continue
        weight, eps = module.get_parameter("weight"), _epsilon(module)
        style = _style(module, eps) if eps is not None else "its epsilon depends on the dtype"
        if eps is not None and style in reference.STYLES:
            sites.append(NormSite(path, weight.shape[0], eps, style, weight.dtype))
        else:
            others.append(NotASite(path, f"{type(module).__name__}: {style}"))
    return sites, others


def _has_structure(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters(recurse=False))
    return (
        set(parameters) == {"weight"}
        and parameters["weight"].dim() == 1
        and not any(module.children())
        and any(hasattr(module, name) for name in EPSILON_NAMES)
    )


def _epsilon(module: nn.Module) -> float | None:
    values = [getattr(module, name, None) for name in EPSILON_NAMES]
    return next((float(value) for value in values if isinstance(value, float)), None)


def _style(module: nn.Module, eps: float) -> str:
    """The style of the kernels' definition that `module` computes, else the reason why none is."""
    if is_patched(module):
        return "its forward has been patched"
    arguments = list(inspect.signature(module.forward).parameters)
    if len(arguments) != 1:
        return f"it takes {', '.join(arguments)}"
    errors = dict.fromkeys(reference.STYLES, 0.0)
    for row_dtype, weight_dtype in DTYPES:
        twin, rows = _twin(module, weight_dtype), _rows(module, row_dtype)
        try:
            with torch.no_grad(), warnings.catch_warnings(action="ignore"):
                theirs = twin(rows)
        except (RuntimeError, TypeError, ValueError) as error:
            return f"it does not run on rows of its width ({error})"
        for style in errors:
            ours = reference.forward(rows, twin.get_parameter("weight").data, eps, None, style)[0]
            errors[style] = max(errors[style], _error(ours, theirs))
    best = min(errors, key=lambda style: errors[style])
    if errors[best] <= ROUNDINGS:
        return best
    return "it computes something else than an RMS norm"


def _twin(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy on the CPU with random weights: ones or zeros would hide what they are used for, small
    ones that the output is cut off somewhere."""
    twin = copy.deepcopy(module).to_empty(device="cpu").to(dtype)
    weight = twin.get_parameter("weight")
    with torch.no_grad():
        weight.copy_(8 * random_tensor(weight.shape, seed=1))
    return twin


def _rows(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """(4, H) of several magnitudes, with a mean that is not 0."""
    width = module.get_parameter("weight").shape[0]
    scales = torch.tensor(ROW_SCALES)[:, None]
    return ((random_tensor((len(ROW_SCALES), width), seed=2) + 0.5) * scales).to(dtype)


def _error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference in units of the last place of the row's largest value."""
    if not isinstance(theirs, Tensor) or ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return float("inf")
    unit = theirs.abs().amax(-1, keepdim=True).double() * torch.finfo(theirs.dtype).eps
    return ((ours.double() - theirs.double()).abs() / unit.clamp_min(1e-300)).max().item()
