"""A backend that was chosen, and its calls: the first is on record, results are looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fasttrain_kernels.problem import text
from fasttrain_kernels.proof import allowed_to_wait
from fasttrain_kernels.registry import Candidate
from fasttrain_kernels.store import now, store_for

FIRST_CHECKS = 8  # calls of each choice and pass whose results are looked at
# And then one in so many. On a CPU a look costs a pass over the results, on a GPU a wait too.
# Primes, for a model calls its layers in turn: each 256th call of 32 layers is of the last one.
CHECK_EVERY = {"cpu": 257, "cuda": 4099}

Call = Callable[[ModuleType], Any]


class Chosen:
    """A backend that serves a problem, and how often it has."""

    def __init__(self, op: str, candidate: Candidate, problem: Any, alone: bool) -> None:
        module = candidate.load()
        assert isinstance(module, ModuleType)
        self.module, self.op, self.candidate, self.problem = module, op, candidate, problem
        self.alone = alone  # asked for by name or by mode "strict": nothing else may serve
        self._every = CHECK_EVERY.get(problem.device.type, CHECK_EVERY["cpu"])
        self._calls: Counter[str] = Counter()
        self._launched: set[str] = set()

    def call(self, phase: str, call: Call) -> Any:
        """What `call` makes of the module, in the "forward" or the "backward" pass."""
        if phase in self._launched or capturing(self.problem.device):
            return call(self.module)
        return self._first(phase, call)

    def has_launched(self, phase: str) -> bool:
        """Whether a launch of it has come to an end in this process."""
        return phase in self._launched

    def is_to_be_checked(self, phase: str) -> bool:
        """Whether this call's result is to be looked at; counts the calls."""
        self._calls[phase] += 1
        if self._calls[phase] > FIRST_CHECKS and self._calls[phase] % self._every:
            return False
        return not capturing(self.problem.device)

    def _first(self, phase: str, call: Call) -> Any:
        """The first launch of this process; on record, if it is the first on this machine."""
        device = self.problem.device
        store = store_for(device.type, device.index)
        facts = text(self.problem, without=("rows",))
        key = f"{self.op}|{self.candidate.name}|{phase}|{facts}"
        if store.get("launched", key) is None:
            flight = store.in_flight(self.op, self.candidate.name, f"first {phase} pass ({facts})")
            with flight, allowed_to_wait(device):
                result = call(self.module)
            store.put("launched", key, now())
        else:
            result = call(self.module)
        self._launched.add(phase)
        return result


def is_finite(result: Any, device: torch.device) -> bool:
    """Whether every number of a kernel's result is. Waits for the device."""
    with torch.no_grad(), allowed_to_wait(device):
        largest = [torch.linalg.vector_norm(t.detach(), float("inf")) for t in _floats(result)]
        return all(bool(value.isfinite()) for value in largest)


def _floats(result: Any) -> Iterator[Tensor]:
    if isinstance(result, (tuple, list)):
        for part in result:
            yield from _floats(part)
    elif isinstance(result, Tensor) and result.is_floating_point() and result.numel() > 0:
        yield result


def is_lost(error: Exception, device: torch.device) -> bool:
    """Whether the GPU serves nothing any more in this process, so that no call can be made again.

    Such an error is seen later than it is made, unless one waits: it says nothing of who made it.
    """
    if device.type != "cuda":
        return False
    return isinstance(error, torch.AcceleratorError) or "Triton Error [CUDA]" in str(error)


def capturing(device: torch.device) -> bool:
    """Whether calls are being recorded as a CUDA graph, in which nothing may wait."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
