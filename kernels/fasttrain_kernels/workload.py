"""What a timing pass runs: an op forward and backward, as a training step would.

Each op's `workload.py` makes one: `workload(problem, *, rows, lengths) -> Workload`; rows: 0 for as
many as the problem says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Result = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Workload:
    """A problem with tensors in it.

    call: the op, on a backend by name; plain: what a model does that has no kernel. Both return
    tensors of which `leaves` get gradients. gradients: of what is returned; without leaves, tensors
    that the op is given. By both the memory of a step is judged.
    """

    call: Callable[[str], Result]
    plain: Callable[[], Result]
    leaves: Sequence[Tensor]
    gradients: Sequence[Tensor]

    @classmethod
    def without_gradients(
        cls,
        call: Callable[[str], Any],
        plain: Callable[[], Any],
        tensors: Sequence[Tensor] = (),
    ) -> Workload:
        """Of an op that isn't differentiated, and is given `tensors`."""
        return cls(call, plain, (), tensors)

    def step(self, backend: str | None) -> None:
        """Forward and backward; None: plain."""
        with torch.enable_grad():
            result: Any = self.plain() if backend is None else self.call(backend)
        if not self.leaves:
            return
        # Not .backward(): in a model nothing accumulates into activations.
        torch.autograd.grad(result, self.leaves, self.gradients)


class Drawn:
    """Random tensors on a device, always the same ones; the process's random state stays."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator) * scale
        return drawn.to(device=self.device, dtype=dtype)

    def leaf(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """One that gets a gradient."""
        return self.normal(*shape, dtype=dtype, scale=scale).requires_grad_()

    def labels(self, count: int, classes: int) -> Tensor:
        drawn = torch.randint(classes, (count,), generator=self.generator)
        return drawn.to(self.device)

    def words(self, count: int, vocabulary: int) -> Tensor:
        """Ids of which the r-th most frequent occurs about 1 / r as often as the first (Zipf)."""
        uniform = torch.rand(count, generator=self.generator, dtype=torch.float64)
        ranks = (float(vocabulary) ** uniform - 1).long().clamp(max=vocabulary - 1)
        return torch.randperm(vocabulary, generator=self.generator)[ranks].to(self.device)
