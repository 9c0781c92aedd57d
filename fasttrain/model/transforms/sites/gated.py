"""Gated MLPs: down(act(gate(x)) * up(x)), with gate and up apart or as the halves of one layer.

They are found by the names that transformers gives the layers, and accepted when a twin with tiny
layers computes that formula.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from fasttrain_kernels import geglu, swiglu
from torch import Tensor, nn

from fasttrain.core.batch import BatchProfile
from fasttrain.model.transforms.sites.site import (
    NotASite,
    is_patched,
    only,
    patch_forward,
    random_tensor,
)

# The layers' names: gate, up, down; or gate and up in one, down.
APART = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
PACKED = (("gate_up_proj", "down_proj"),)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "none": nn.functional.gelu,
}
GELUS = {"tanh": "gelu_tanh", "none": "gelu"}  # as kernels call them
WIDTH, INNER = 4, 6  # of the twin
SIZES = (1.0, 1e3)  # of its inputs: the large ones show where values are cut off


@dataclass(frozen=True)
class _GatedSite:
    path: str
    layers: tuple[str, ...]
    activation: str  # "silu", or geglu's `approximate`
    width: int  # of the gate

    def facts(self, profile: BatchProfile) -> dict[str, Any]:
        activation = GELUS.get(self.activation, "silu")
        return {"activation": activation, "width": self.width, "rows": profile.tokens}

    def put(self, model: nn.Module, backend: str) -> None:
        layers, unit = self.layers, _unit(self.activation, backend)

        def forward(self: nn.Module, *args: Tensor, **named: Tensor) -> Tensor:
            x = only(args, named)
            *inner, down = (self.get_submodule(name) for name in layers)
            result: Tensor = down(unit(*(layer(x) for layer in inner)))
            return result

        patch_forward(model.get_submodule(self.path), forward)


@dataclass(frozen=True)
class SwigluSite(_GatedSite):
    """An MLP gated by SiLU."""

    op: ClassVar[str] = "swiglu"


@dataclass(frozen=True)
class GegluSite(_GatedSite):
    """An MLP gated by GELU, exact or by tanh."""

    op: ClassVar[str] = "geglu"


def _unit(activation: str, backend: str) -> Callable[..., Tensor]:
    """(gate, up), or the two side by side -> act(gate) * up."""
    if activation == "silu":
        return lambda gate, up=None: swiglu(gate, up, backend=backend)
    return lambda gate, up=None: geglu(gate, up, approximate=activation, backend=backend)


def find_swiglu(model: nn.Module) -> tuple[list[SwigluSite], list[NotASite]]:
    """MLPs gated by SiLU, and those that look gated and are by nothing that is known."""
    sites: list[SwigluSite] = []
    others: list[NotASite] = []
    for path, module, layers in _candidates(model):
        activation = _activation(module, layers)
        if activation == "silu":
            sites.append(SwigluSite(path, layers, activation, _width(module, layers)))
        elif activation not in ACTIVATIONS:
            others.append(NotASite(path, f"{type(module).__name__}: {activation}"))
    return sites, others


def find_geglu(model: nn.Module) -> tuple[list[GegluSite], list[NotASite]]:
    """MLPs gated by GELU."""
    sites = []
    for path, module, layers in _candidates(model):
        activation = _activation(module, layers)
        if activation in ACTIVATIONS and activation != "silu":
            sites.append(GegluSite(path, layers, activation, _width(module, layers)))
    return sites, []


def _width(module: nn.Module, layers: tuple[str, ...]) -> int:
    """What the gate hands to the last layer."""
    width = getattr(module.get_submodule(layers[-1]), "in_features", 0)
    return width if isinstance(width, int) else 0


def _candidates(model: nn.Module) -> list[tuple[str, nn.Module, tuple[str, ...]]]:
    found: list[tuple[str, nn.Module, tuple[str, ...]]] = []
    for path, module in model.named_modules():
        children = dict(module.named_children())
        for layers in (*APART, *PACKED):
            if children.keys() >= set(layers):
                found.append((path, module, layers))
                break
    return found


def _activation(module: nn.Module, layers: tuple[str, ...]) -> str:
    """The name of the activation, else the reason why `module` is no site."""
    if is_patched(module):
        return "its forward has been patched"
    beside = [name for name, child in module.named_children() if name not in layers]
    if any(list(module.get_submodule(name).parameters()) for name in beside) or len(beside) > 1:
        return f"it has {', '.join(beside)} beside its projections"
    for name, activation in ACTIVATIONS.items():
        if all(_agrees(module, layers, activation, size) for size in SIZES):
            return name
    return "it computes something else than a gated unit"


def _agrees(
    module: nn.Module, layers: tuple[str, ...], activation: Callable[[Tensor], Tensor], size: float
) -> bool:
    """Whether the formula gives what twins in training and in evaluation give for inputs as large
    as `size`."""
    x = size * random_tensor((5, WIDTH), seed=9)
    for training in (True, False):
        twin = _twin(module, layers, training)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                theirs = twin(x)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return False
        with torch.no_grad():
            ours = _formula(twin, layers, activation, x)
        if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
            return False
        if not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6 * float(ours.abs().max())):
            return False
    return True


def _twin(module: nn.Module, layers: tuple[str, ...], training: bool) -> nn.Module:
    """The module with tiny layers of random weights, and copies of what it has beside them."""
    twin = copy.copy(module)
    children = {name: child for name, child in module.named_children() if name not in layers}
    vars(twin)["_modules"] = copy.deepcopy(children)
    *inner, down = layers
    widths = dict.fromkeys(inner, (WIDTH, INNER if len(inner) == 2 else 2 * INNER))
    for seed, (name, (columns, rows)) in enumerate((widths | {down: (INNER, WIDTH)}).items()):
        layer = nn.Linear(columns, rows, bias=False, device="meta")  # draws no random numbers
        layer.weight = nn.Parameter(2 * random_tensor((rows, columns), seed=seed))
        twin._modules[name] = layer
    return twin.train(training)


def _formula(
    twin: nn.Module, layers: tuple[str, ...], activation: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    *inner, down = (twin.get_submodule(name) for name in layers)
    made = [layer(x) for layer in inner]
    gate, up = made if len(made) == 2 else made[0].chunk(2, -1)
    result: Tensor = down(activation(gate) * up)
    return result
