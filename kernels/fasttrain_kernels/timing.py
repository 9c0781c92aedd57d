"""Times the backends of an op on a problem, beside eager PyTorch, and keeps what it finds.

Forward and backward, on tensors of the run's sizes and of its documents' lengths; interleaved
rounds, of which the least counts, so that a disturbance meets all alike. Whoever holds more memory
than the budget allows, at once or more and more, is rejected, and so is whoever fails. Records are
kept by the problem, whose sizes are rounded, the number of threads, and whether torch was told to
be deterministic.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fasttrain_kernels import memory
from fasttrain_kernels.memory import ran_out
from fasttrain_kernels.problem import text
from fasttrain_kernels.proof import allowed_to_wait, default_on_cpu, first_line
from fasttrain_kernels.registry import Candidate
from fasttrain_kernels.settings import EAGER, Settings, put_above
from fasttrain_kernels.store import now, store_for
from fasttrain_kernels.workload import Workload

if TYPE_CHECKING:
    from fasttrain_kernels.dispatch import Op

PLAIN = "plain"  # a model's own code, among backends
SECONDS = 1.0  # of all rounds of a problem, about
FEWEST, MOST = 7, 100  # rounds
TOO_SLOW = 4.0  # times the fastest; such a one is called no more, unless it is
NO_MATTER = 5e-3  # seconds, or shorter: on a busy machine a short call may take 20 times its time
SAMPLES_TO_JUDGE = 3
LONG_CALL = 1.0  # seconds; then the first call of what doesn't compile says enough
SHORTEST_SAMPLE = 1e-3  # seconds; shorter calls are repeated within a sample
SHARE_OF_FREE_MEMORY = 0.25
TIMES_THE_TENSORS = 3  # of the problem; beyond, a step's memory is not the model's any more
SMALL = 256 * 2**20  # bytes that nobody minds


log = logging.getLogger("fasttrain.kernels")


class Sizes(NamedTuple):
    """What a problem rounds."""

    rows: int = 0  # 0: as the problem has them
    lengths: tuple[int, ...] = ()  # of documents; (): all as long as the problem says


@dataclass
class _Trial:
    """One backend on its way through a timing pass."""

    step: Callable[[], None]
    flight: AbstractContextManager[None]  # around the first calls, which may end the process
    samples: list[float] = field(default_factory=list)
    calls: int = 1  # a sample
    peak: int | None = None  # bytes above what was held before
    held: int = 0  # bytes that its calls have not given back
    rejected: str | None = None

    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = {"bytes": self.peak}
        if self.samples:
            found["ms"] = min(self.samples) * 1e3
        if self.rejected is not None:
            found["rejected"] = self.rejected
        return found


def milliseconds(op: Op, problem: Any, *, in_model: bool = False) -> dict[str, float]:
    """What is on record for each backend that may be taken, "eager" among them; {} for nothing.

    in_model: "eager" is a model's own code rather than the op's reference.
    """
    found = {n: r["ms"] for n, r in _records(op, problem).items() if "rejected" not in r}
    plain = found.pop(PLAIN, None)
    if in_model:
        found.pop(EAGER, None)
        if plain is not None:
            found[EAGER] = plain
    return found


def rejections(op: Op, problem: Any) -> dict[str, str]:
    """Whom a timing pass found fault with, and why; eager PyTorch is legal all the same."""
    records = _records(op, problem).items()
    return {n: r["rejected"] for n, r in records if "rejected" in r and n not in (EAGER, PLAIN)}


def measure(
    op: Op,
    problem: Any,
    candidates: Sequence[Candidate],
    sizes: Sizes | None = None,
    *,
    in_model: bool = False,
    budget: int | None = None,
) -> None:
    """Time `candidates` and eager PyTorch, unless that is on record.

    in_model: the op's reference is not among them: a model's own code stands for eager PyTorch.
    budget: bytes that a backend may hold beyond the tensors it is given; by default three times
    these tensors, and no more than a quarter of what is free. Nothing is measured for a problem of
    unknown size.
    """
    if problem.rows == 0:
        return
    names = {candidate.name for candidate in candidates} - ({EAGER} if in_model else set())
    store = store_for(problem.device.type, problem.device.index)
    if names <= _records(op, problem).keys():
        return
    with store.measuring():
        if not names <= _records(op, problem).keys():  # another process may have measured it
            log.info("%s: timing %s", op.name, ", ".join(sorted(names)))
            try:
                backends = _measured(op, problem, names, sizes or Sizes(), budget)
            except Exception as error:
                if not ran_out(error):
                    raise
                log.warning("%s is not timed: no memory for (%s)", op.name, text(problem))
                return
            store.put("times", _key(op, problem), {"date": now(), "backends": backends})


def sample(step: Callable[[], object], device_type: str, calls: int = 1) -> float:
    """Seconds a call, of `calls` in a row."""
    if device_type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - begin) / calls


def _key(op: Op, problem: Any) -> str:
    deterministic = torch.are_deterministic_algorithms_enabled()
    facts = f"{text(problem)}, threads={torch.get_num_threads()}, deterministic={deterministic}"
    return f"{op.name}|{facts}"


def _records(op: Op, problem: Any) -> dict[str, dict[str, Any]]:
    found = store_for(problem.device.type, problem.device.index).get("times", _key(op, problem))
    return {} if found is None else dict(found["backends"])


def _measured(
    op: Op, problem: Any, names: set[str], sizes: Sizes, budget: int | None
) -> dict[str, Any]:
    device = problem.device
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(allowed_to_wait(device))
        module = importlib.import_module(op.workload)
        with default_on_cpu():
            workload: Workload = module.workload(problem, rows=sizes.rows, lengths=sizes.lengths)
        budget = budget or _budget(workload, device)
        trials = {
            name: _Trial(_on(op, workload, name), _flight(op, name, problem)) for name in names
        }
        trials[PLAIN] = _Trial(lambda: workload.step(None), nullcontext())
        compiling = names - {EAGER} if device.type == "cuda" else _providers(op)
        _first_calls(trials, compiling, device, budget)
        _rounds(trials, device, budget)
    return {name: trial.record() for name, trial in trials.items()}


def _budget(workload: Workload, device: torch.device) -> int:
    tensors = sum(t.numel() * t.element_size() for t in (*workload.leaves, *workload.gradients))
    wanted = max(SMALL, TIMES_THE_TENSORS * tensors)
    return min(wanted, int(memory.free(device) * SHARE_OF_FREE_MEMORY))


def _providers(op: Op) -> set[str]:
    return {candidate.name for candidate in op.candidates if candidate.provider}


def _on(op: Op, workload: Workload, backend: str) -> Callable[[], None]:
    def step() -> None:
        with put_above(Settings("the timing pass", backends=((op.name, backend),))):
            workload.step(backend)

    return step


def _flight(op: Op, name: str, problem: Any) -> AbstractContextManager[None]:
    """At the run's size for the first time, whatever smaller ones have shown. The reference can't
    be avoided, so that nothing is written down of it."""
    if name == EAGER:
        return nullcontext()
    store = store_for(problem.device.type, problem.device.index)
    return store.in_flight(op.name, name, f"timing pass ({text(problem)})")


def _first_calls(
    trials: dict[str, _Trial], compiling: set[str], device: torch.device, budget: int
) -> None:
    """The calls that find what each takes in time and memory."""
    for name, trial in trials.items():
        try:
            with trial.flight:
                once, trial.peak = _observed(trial.step, device, name in compiling)
        except Exception as error:
            none_left = "there is not enough memory for it"
            trial.rejected = none_left if ran_out(error) else f"fails: {first_line(error)}"
            continue
        trial.samples = [once]
        trial.calls = _calls(once)
        if trial.peak is not None and trial.peak > budget:
            trial.rejected = f"holds {_mb(trial.peak)} at its peak; the budget is {_mb(budget)}"


def _observed(
    step: Callable[[], None], device: torch.device, compiles: bool
) -> tuple[float, int | None]:
    """Seconds and peak memory of a call; of the second, where the first compiles or is short."""
    with memory.PeakMemory(device.type, collects=False) as peak:
        once = sample(step, device.type)
    if compiles or once < LONG_CALL:
        with memory.PeakMemory(device.type, collects=False) as peak:
            once = sample(step, device.type)
    if once < LONG_CALL:
        # The least of several: who is thought too slow is called no more, and PeakMemory has taken
        # free memory away, which costs a short call more than itself.
        once = min(sample(step, device.type, _calls(once)) for _ in range(SAMPLES_TO_JUDGE))
    return once, peak.bytes


def _calls(seconds: float) -> int:
    """Of a sample, where a call takes so long."""
    return max(1, round(SHORTEST_SAMPLE / seconds))


def _rounds(trials: dict[str, _Trial], device: torch.device, budget: int) -> None:
    running = [trial for trial in trials.values() if trial.rejected is None]
    fastest = min((trial.samples[0] for trial in running), default=0.0)
    longest = max(TOO_SLOW * fastest, NO_MATTER)
    running = [trial for trial in running if trial.samples[0] <= longest]
    a_round = sum(trial.samples[0] * trial.calls for trial in running)
    rounds = max(FEWEST, min(MOST, int(SECONDS / a_round))) if running else 0
    for _ in range(rounds):
        for trial in running:
            if trial.rejected is None:
                _take(trial, device, budget)


def _take(trial: _Trial, device: torch.device, budget: int) -> None:
    before = memory.held(device)
    try:
        trial.samples.append(sample(trial.step, device.type, trial.calls))
    except Exception as error:
        trial.rejected = f"fails: {first_line(error)}"
        return
    trial.held += memory.held(device) - before
    if trial.held > budget:
        trial.rejected = (
            f"has not given back {_mb(trial.held)} after {len(trial.samples)} calls; the budget "
            f"is {_mb(budget)}"
        )


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
