"""What a place in a model is where a kernel can stand in, and how it gets there and back out.

Sites are found by structure and accepted by what they compute, so that there is no list of
architectures. Kernels are put into module instances: no class and no global is touched, so that two
models in one process can differ. copy.deepcopy and save_pretrained serve such a model; torch.save
of the module itself doesn't (it fails when it is loaded): revert it first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from fasttrain.core.batch import BatchProfile

MARK = "has_fasttrain_kernel"  # of instances whose forward is ours


class Site(Protocol):
    """A module, by its path, that a kernel of `op` can serve."""

    op: ClassVar[str]

    @property
    def path(self) -> str: ...

    def facts(self, profile: BatchProfile) -> dict[str, Any]:
        """What a choice of backend follows from, beside device and dtype."""

    def put(self, model: nn.Module, backend: str) -> None:
        """Make the module run on `backend`."""


@dataclass(frozen=True)
class NotASite:
    """A module that has the structure of a site and is none, or none that can be replaced."""

    path: str
    reason: str


def patch_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give this instance another forward, a function whose first argument is the module."""
    assert "forward" not in vars(module), "somebody has patched this module before"
    # A method is pickled by its name: under this one it is not found, where under "forward" the
    # class's own would be, in silence.
    forward.__name__ = MARK
    # A bound method, not a closure over the module: copy.deepcopy then binds it to the copy.
    module.forward = MethodType(forward, module)
    vars(module)[MARK] = True


def unpatch_forward(module: nn.Module) -> None:
    """Take it out again, if it was put in."""
    if vars(module).pop(MARK, False):
        del module.forward


def is_patched(module: nn.Module) -> bool:
    """Whether this instance's forward is not its class's, whoever changed it."""
    return "forward" in vars(module)


def has_kernel(module: nn.Module) -> bool:
    return MARK in vars(module)


def only(args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The one argument of a call, whatever its class calls it."""
    (argument,) = (*args, *named.values())
    return argument


def random_tensor(shape: tuple[int, ...] | torch.Size, *, seed: int) -> Tensor:
    """For trying modules out; the run's random state is not touched."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
