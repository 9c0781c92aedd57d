"""The package flash-attn (Dao, arXiv 2307.08691, and its successors), where it is installed: the
best of its versions that is there, can be imported and is made for the GPU.

Called below its autograd functions, which don't hand out lse. What those functions take differs
from version to version and within version 3, so each is asked for its arguments' names.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttrain_kernels.ops.packed_attention.providers import (
    flash_varies,
    flash_why_not,
    flash_window,
    longest,
    positive_scale,
    unserved,
)
from fasttrain_kernels.ops.packed_attention.reference import Documents, Mask, Problem


@dataclass(frozen=True)
class Version:
    """Where one of the package's versions has its functions, and the widest heads that it serves
    everywhere."""

    name: str
    module: str
    forward: str
    backward: str
    max_width: int
    unlimited: int | None = -1  # its word for a window without an end


VERSION_2 = Version(
    "flash-attn 2",
    "flash_attn.flash_attn_interface",
    "_flash_attn_varlen_forward",
    "_flash_attn_varlen_backward",
    256,
)
VERSION_3 = Version(
    "flash-attn 3", "flash_attn_interface", "_flash_attn_forward", "_flash_attn_backward", 256
)
VERSION_4 = Version(
    "flash-attn 4", "flash_attn.cute.interface", "_flash_attn_fwd", "_flash_attn_bwd", 128, None
)
# By the first number of the GPU's compute capability, the fastest first.
MADE_FOR = {9: (VERSION_3, VERSION_4, VERSION_2), 10: (VERSION_4, VERSION_2)}


# Each of these is known to a function, under one of its names, or it isn't called.
NEEDED = (
    {"cu_seqlens_q"},
    {"max_seqlen_q"},
    {"softmax_scale"},
    {"causal", "is_causal"},
    {"window_size", "window_size_left"},
    {"softcap"},
)


class Functions(NamedTuple):
    """What was found."""

    version: Version
    forward: Callable[..., Any]
    backward: Callable[..., Any]


def unsupported(problem: Problem) -> str | None:
    """The reason why flash-attn can't serve `problem`, or None."""
    if (reason := flash_why_not(problem) or unserved(problem, "sinks")) is not None:
        return reason
    found = _find(problem.device, problem.head_dim)
    return found if isinstance(found, str) else None


def varies(problem: Problem) -> str | None:
    """Why two calls may differ in bits, or None."""
    return flash_varies(problem)


def forward(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, mask: Mask, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As reference.forward."""
    found = _find(q.device, q.shape[2])
    assert isinstance(found, Functions), found
    q, mask, _ = positive_scale(q, mask)
    tensors = {"q": q, "k": k, "v": v, "return_lse": True}
    o, lse = _call(found.forward, _options(found.version, documents, mask) | tensors)[:2]
    return o, lse


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    documents: Documents,
    mask: Mask,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As reference.backward."""
    found = _find(q.device, q.shape[2])
    assert isinstance(found, Functions), found
    q, mask, sign = positive_scale(q, mask)
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    tensors = {"dout": do.contiguous(), "q": q, "k": k, "v": v, "out": o}
    tensors |= {"lse": lse, "softmax_lse": lse, "dq": dq, "dk": dk, "dv": dv}
    result = _call(found.backward, _options(found.version, documents, mask) | tensors)
    if isinstance(result, tuple):  # else they were written where asked for
        dq, dk, dv = result[:3]
    return dq if sign == 1 else dq * sign, dk, dv, q.new_empty(0)


def _options(version: Version, documents: Documents, mask: Mask) -> dict[str, Any]:
    """What is asked besides the tensors, under every name that a version has for it."""
    offsets, most = documents.cu_seqlens.contiguous(), longest(documents)
    left, right = (version.unlimited if end < 0 else end for end in flash_window(mask))
    return {
        "cu_seqlens_q": offsets,
        "cu_seqlens_k": offsets,
        "max_seqlen_q": most,
        "max_seqlen_k": most,
        "softmax_scale": mask.scale,
        "causal": mask.causal,
        "is_causal": mask.causal,
        "window_size": (left, right),
        "window_size_left": left,
        "window_size_right": right,
        "softcap": mask.softcap or 0.0,
        "dropout_p": 0.0,
        "return_softmax": False,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _call(function: Callable[..., Any], offered: dict[str, Any]) -> Any:
    """`function` with what it takes of `offered`, and None for what else it must be given."""
    return function(
        **{
            name: offered.get(name)
            for name, parameter in _parameters(function).items()
            if name in offered or parameter.default is parameter.empty
        }
    )


@functools.cache
def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    # torch.library.custom_op keeps the function as _init_fn, and hides its arguments.
    signature = inspect.signature(getattr(function, "_init_fn", function))
    return dict(signature.parameters)


def _find(device: torch.device, width: int) -> Functions | str:
    return _find_for(torch.cuda.get_device_capability(device)[0], width)


@functools.cache
def _find_for(generation: int, width: int) -> Functions | str:
    """The functions for such a GPU and heads, or the reason why there are none."""
    reasons = []
    for version in MADE_FOR.get(generation, (VERSION_2,)):
        found = _import(version)
        if isinstance(found, Functions) and width > version.max_width:
            found = (
                f"{version.name} serves heads of up to {version.max_width} elements; these "
                f"have {width}"
            )
        if isinstance(found, Functions):
            return found
        reasons.append(found)
    return "; ".join(filter(None, reasons)) or "flash-attn is not installed"


def _import(version: Version) -> Functions | str:
    """A version's functions; the reason why it can't be used, which is empty where it isn't
    installed."""
    try:
        module = importlib.import_module(version.module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name is not None
        if missing and f"{version.module}.".startswith(f"{error.name}."):
            return ""
        return f"{version.name} cannot be imported: {error}"
    forward, backward = (
        getattr(module, each, None) for each in (version.forward, version.backward)
    )
    if forward is None or backward is None or not _known(forward) or not _known(backward):
        return f"{version.name} is of a release whose functions take other arguments"
    return Functions(version, forward, backward)


def _known(function: Callable[..., Any]) -> bool:
    return all(names & _parameters(function).keys() for names in NEEDED)
