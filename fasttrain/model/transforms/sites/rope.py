"""Rotary position embeddings: attention layers that call a function apply_rotary_pos_emb.

That function is a global of the file which defines the layer. It can't be replaced there without
reaching every other model, so an instance gets a forward of its own: the same code, with globals in
which that one name means our kernel.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, ClassVar

import torch
from fasttrain_kernels import rope
from torch import Tensor, nn

from fasttrain.core.batch import BatchProfile
from fasttrain.model.transforms.sites.site import (
    NotASite,
    has_kernel,
    is_patched,
    patch_forward,
    random_tensor,
)

FUNCTION = "apply_rotary_pos_emb"
STYLES = ("half", "interleaved")
TOKENS = 7  # in a trial


@dataclass(frozen=True)
class RopeSite:
    """An attention layer that rotates its queries and keys."""

    op: ClassVar[str] = "rope"
    path: str
    head_dim: int
    style: str
    query_heads: int
    key_heads: int

    def facts(self, profile: BatchProfile) -> dict[str, Any]:
        return {
            "head_dim": self.head_dim,
            "style": self.style,
            "query_heads": self.query_heads,
            "key_heads": self.key_heads,
            "rows": profile.tokens,
        }

    def put(self, model: nn.Module, backend: str) -> None:
        module = model.get_submodule(self.path)
        patch_forward(module, _forward_with(type(module).forward, self.style, backend))
        if all(has_kernel(layer) for _, layer, _ in _layers(model)):
            for table in _tables(model):
                if not has_kernel(table):
                    patch_forward(table, _float32_table)


def find_rope(model: nn.Module) -> tuple[list[RopeSite], list[NotASite]]:
    """Every attention layer that rotates, and why one can't be served."""
    sites: list[RopeSite] = []
    others: list[NotASite] = []
    layers = _layers(model)
    trials = [trial for table in _tables(model) for trial in _trials(table)] if layers else []
    for path, module, functions in layers:
        style = _style(module, functions, trials)
        if style in STYLES:
            width = _head_dim(module) or trials[0][0].shape[-1]
            sites.append(RopeSite(path, width, style, *_heads(module)))
        else:
            others.append(NotASite(path, f"{type(module).__name__}: {style}"))
    return sites, others


def _layers(model: nn.Module) -> list[tuple[str, nn.Module, set[str]]]:
    """Layers that call functions which rotate, and these functions' names."""
    found = []
    for path, module in model.named_modules():
        names = inspect.unwrap(type(module).forward).__code__.co_names
        functions = {name for name in names if name.startswith("apply_") and "rotary" in name}
        if functions:
            found.append((path, module, functions))
    return found


def _tables(model: nn.Module) -> list[nn.Module]:
    """The modules that make cos and sin."""
    return [
        module
        for module in model.modules()
        if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))
    ]


# ---- whether our kernel computes what the layer's function does ---------------------------------


def _style(module: nn.Module, functions: set[str], trials: list[tuple[Tensor, Tensor]]) -> str:
    """The style in which `module` rotates, else the reason why none of ours is it."""
    forward = type(module).forward
    if functions != {FUNCTION}:
        return f"it rotates by {', '.join(sorted(functions - {FUNCTION}))}"
    if is_patched(module):
        return "its forward has been patched"
    if inspect.unwrap(forward) is not forward:
        return "its forward is wrapped by a decorator"
    if not trials:
        return "no module of the model makes its cos and sin"
    function = forward.__globals__.get(FUNCTION)
    # A function that is given the part of a head which is rotated (Phi) takes no more than that.
    widths = (_head_dim(module), trials[0][0].shape[-1])
    for style in STYLES:
        for width in filter(None, widths):
            if all(_agrees(function, width, cos, sin, style) for cos, sin in trials):
                return style
    return "it rotates in a way of its own"


def _agrees(function: Any, width: int, cos: Tensor, sin: Tensor, style: str) -> bool:
    q, k = (random_tensor((1, heads, TOKENS, width), seed=heads) for heads in (4, 2))
    try:
        theirs = function(q, k, cos, sin)
        ours = _rotate(q, k, cos, sin, style=style, backend="eager")
        pairs = list(zip(ours, theirs, strict=True))
        return all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in pairs)
    except (RuntimeError, TypeError, ValueError):
        return False


def _trials(table: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """cos and sin (1, T, R) as a twin of `table` on the CPU makes them, for each type of layer that
    has its own; none where it can't be tried."""
    positions = torch.arange(TOKENS)[None]
    try:
        with torch.device("cpu"):
            twin = type(table)(table.config)
        arguments = inspect.signature(twin.forward).parameters
        config: Any = table.config
        kinds = sorted(set(config.layer_types)) if "layer_type" in arguments else [None]
        x = torch.empty(1, TOKENS, 1)
        return [twin(x, positions, *([kind] if kind else [])) for kind in kinds]
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return []


def _heads(module: nn.Module) -> tuple[int, int]:
    """Of queries and of keys, as transformers' configs name their numbers; 0 where unknown."""
    config = getattr(module, "config", None)
    query_heads = getattr(config, "num_attention_heads", None) or 0
    return query_heads, getattr(config, "num_key_value_heads", None) or query_heads


def _head_dim(module: nn.Module) -> int | None:
    sizes = (getattr(module, name, None) for name in ("head_dim", "head_size"))
    return next((size for size in sizes if isinstance(size, int)), None)


# ---- what takes the place of the function, and of the forward that calls it ---------------------


@functools.cache
def _forward_with(forward: Any, style: str, backend: str) -> Callable[..., Any]:
    """`forward` with our rotation, and its other globals as they are now. One function for all
    layers of a class: torch.compile then needs one graph for them."""
    rotate = functools.partial(_rotate, style=style, backend=backend)
    # Without __name__: torch.compile would look names up in the module that is called so.
    scope = {name: value for name, value in forward.__globals__.items() if name != "__name__"}
    scope[FUNCTION] = rotate
    made = FunctionType(
        forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__
    )
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    unsqueeze_dim: int = 1,
    *,
    style: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """q (B, Hq, T, D), k (B, Hk, T, D), cos, sin (B or 1, T, R), both halves of which are alike.
    With unsqueeze_dim=2 tokens come before heads."""
    heads_first = unsqueeze_dim == 1
    if heads_first:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    rows, tokens = q.shape[:2]
    table = [_half(t, style).expand(rows, -1, -1).flatten(0, 1) for t in (cos, sin)]
    q, k = rope(
        q.flatten(0, 1),
        k.flatten(0, 1),
        table=(table[0], table[1]),
        style=style,
        backend=backend,
    )
    q, k = q.unflatten(0, (rows, tokens)), k.unflatten(0, (rows, tokens))
    return (q.transpose(1, 2), k.transpose(1, 2)) if heads_first else (q, k)


def _half(table: Tensor, style: str) -> Tensor:
    """(.., R) -> (.., R / 2): an angle for each pair."""
    if style == "half":
        return table[..., : table.shape[-1] // 2]
    return table[..., ::2].contiguous()


def _float32_table(self: nn.Module, x: Tensor, *args: Any, **options: Any) -> Any:
    """cos and sin in float32 for 16-bit models too: rounded to bfloat16, positions that are
    thousands apart from a key's look alike. `x` is read for its device and dtype only."""
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x[..., :1].float()
    return type(self).forward(self, x, *args, **options)
