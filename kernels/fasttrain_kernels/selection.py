"""Decides which backend serves a problem, and says why.

1. A backend asked for by name is taken, or that is an error with the reason.
2. Refused is what is made for another device, can't serve the problem, is in quarantine, is left
   out (`providers`), or varies in its bits where nothing may (`deterministic`).
3. "auto" takes the fastest of those that were timed on such a problem (timing.py); where none was,
   the first in order. One that can serve may advise against itself (`advice(problem)`): without a
   time it is then taken by name only.
4. What is about to be taken is proven first (proof.py).
5. "eager", the reference, is last and always legal. In mode "strict", "auto" fails where the first
   in order is refused or disproven; in mode "eager" every op takes the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fasttrain_kernels import timing
from fasttrain_kernels.proof import proven
from fasttrain_kernels.registry import Candidate
from fasttrain_kernels.settings import EAGER, STRICT, Wish, allows
from fasttrain_kernels.store import store_for
from fasttrain_kernels.timing import Sizes

if TYPE_CHECKING:
    from fasttrain_kernels.dispatch import Op

NEARLY = 1.02  # times the fastest: then the first in order is taken; noise decides nothing


class UnsupportedKernel(ValueError):  # noqa: N818  (a public name, fixed by the design)
    """A backend was asked for, by name or by mode "strict", and can't serve the call."""


@dataclass(frozen=True)
class Rejection:
    """One backend that was not chosen, and why."""

    backend: str
    reason: str


@dataclass(frozen=True)
class Choice:
    """One row of the kernel table."""

    op: str
    backend: str
    reason: str
    rejected: tuple[Rejection, ...] = ()
    parity: float | None = None  # worst error against exact values, in units of what is allowed
    milliseconds: float | None = None  # forward and backward, as it was timed
    eager_milliseconds: float | None = None  # the same of eager PyTorch


def decide(
    op: Op, problem: Any, asked: Wish, sizes: Sizes | None = None, *, in_model: bool = False
) -> Choice:
    """The row of the table for `problem`. Runs a self-test of what it takes, where none is on
    record, and a timing pass where `asked.autotune` is "full" and none is either.

    sizes: as they are, for a timing pass. in_model: "eager" is what a model does by itself, rather
    than the op's reference.
    """
    if asked.named:
        return _named(op, problem, asked, in_model)
    return _automatic(op, problem, asked, sizes, in_model)


def refusal(op: Op, candidate: Candidate, problem: Any, asked: Wish) -> str | None:
    """The reason why `candidate` may not serve `problem`, or None; without proof and time."""
    return _left_out(candidate, problem, asked) or why_not(op, candidate, problem)


def why_not(op: Op, candidate: Candidate, problem: Any) -> str | None:
    """The reason why `candidate` can't serve `problem` on this machine, or None."""
    module = candidate.load()
    if isinstance(module, str):
        return module
    reason: str | None = module.unsupported(problem)
    if reason is None and candidate.name in op.aside:
        return "it has just failed"
    if reason is None and candidate.name != EAGER:
        store = store_for(problem.device.type, problem.device.index)
        found = store.quarantined(op.name, candidate.name)
        reason = None if found is None else f"in quarantine: {found}"
    return reason


def advice(candidate: Candidate, problem: Any) -> str | None:
    """Why `candidate`, which may well serve, had better not be taken untimed; or None."""
    return _says(candidate, "advice", problem)


def _left_out(candidate: Candidate, problem: Any, asked: Wish) -> str | None:
    """Why nobody wants it here, whether it can serve or not."""
    if candidate.provider and not allows(asked.providers, candidate.name):
        return "left out: not among the providers allowed"
    varies = _says(candidate, "varies", problem) if asked.deterministic else None
    return None if varies is None else f"not deterministic: {varies}"


def _says(candidate: Candidate, function: str, problem: Any) -> str | None:
    module = candidate.load()
    say = None if isinstance(module, str) else getattr(module, function, None)
    return None if say is None else say(problem)


# --- by name --------------------------------------------------------------------------------------


def _named(op: Op, problem: Any, asked: Wish, in_model: bool) -> Choice:
    candidate = op.candidate(asked.backend)
    refused = refusal(op, candidate, problem, asked)
    parity = _proof(op, candidate, problem) if refused is None else refused
    if isinstance(parity, str):
        able = [c.name for c in op.candidates if refusal(op, c, problem, asked) is None]
        raise UnsupportedKernel(
            f"{op.name}: backend {candidate.name!r}, asked for by {asked.source}, can't serve "
            f"this call: {parity}. These can: {', '.join(able)}"
        )
    times = timing.milliseconds(op, problem, in_model=in_model)
    return _choice(op, candidate, f"asked for by {asked.source}", {}, parity, times)


# --- by itself ------------------------------------------------------------------------------------


def _automatic(op: Op, problem: Any, asked: Wish, sizes: Sizes | None, in_model: bool) -> Choice:
    rejected = _refused(op, problem, asked)
    able = [candidate for candidate in op.candidates if candidate.name not in rejected]
    times: dict[str, float] = {}
    if asked.autotune == "full":
        proper = [candidate for candidate in able if _proves(op, candidate, problem, rejected)]
        timing.measure(op, problem, proper, sizes, in_model=in_model)
    if asked.autotune != "off":
        known = timing.milliseconds(op, problem, in_model=in_model)
        times = {c.name: known[c.name] for c in able if c.name in known}
        rejected |= timing.rejections(op, problem)
    parity: float | str | None = None
    for candidate in _order(able, problem, asked, times):
        if candidate.name in rejected:
            continue
        parity = _proof(op, candidate, problem)
        if not isinstance(parity, str):
            break
        rejected[candidate.name] = parity
    assert not isinstance(parity, str), "eager is last, and its own proof"
    if asked.mode == STRICT:
        _refuse_fallback(op, problem, asked, candidate, rejected)
    for other in (each for each in able if each is not candidate):
        if other.name in times:
            rejected.setdefault(other.name, _beside(candidate, asked, times, times[other.name]))
        elif (against := advice(other, problem)) is not None:
            rejected.setdefault(other.name, against)
    reason = _reason(op, candidate, problem, asked, times)
    return _choice(op, candidate, reason, rejected, parity, times)


def _reason(op: Op, taken: Candidate, problem: Any, asked: Wish, times: dict[str, float]) -> str:
    if taken.name == asked.preferred:
        return "preferred by name"
    if taken.name in times:
        return f"fastest of {len(times)} that were timed"
    first = taken is _first(op, problem, asked)
    return f"first choice on {problem.device.type}" if first else "first that can serve"


def _beside(taken: Candidate, asked: Wish, times: dict[str, float], time: float) -> str:
    """Why one that takes `time` milliseconds was not taken."""
    if taken.name in times and time >= times[taken.name]:
        return f"slower: {time:.3g} ms"
    if taken.name == asked.preferred:
        return f"not preferred: {time:.3g} ms"
    return f"faster by less than {NEARLY - 1:.0%}, and later in order: {time:.3g} ms"


def _refused(op: Op, problem: Any, asked: Wish) -> dict[str, str]:
    """Whom the order of candidates, proofs and times need not be asked about, and why."""
    device, refused = problem.device.type, {}
    for candidate in op.candidates:
        if not candidate.made_for(device):
            made_for = ", ".join(candidate.devices)
            refused[candidate.name] = f"made for {made_for}; the tensors are on {device}"
        elif (reason := refusal(op, candidate, problem, asked)) is not None:
            refused[candidate.name] = reason
    return refused


def _order(
    able: list[Candidate], problem: Any, asked: Wish, times: dict[str, float]
) -> list[Candidate]:
    """In which they are to be taken: as planned, by time, without advice against, eager."""
    fastest = min(times.values(), default=0.0)

    def rank(candidate: Candidate) -> tuple[int, float]:
        if candidate.name == asked.preferred:
            return 0, 0.0
        if candidate.name in times:
            time = times[candidate.name]
            return (1, 0.0) if time <= NEARLY * fastest else (2, time)
        return (4 if candidate.name == EAGER else 3), 0.0

    wanted = {asked.preferred, *times}
    return sorted((c for c in able if c.name in wanted or advice(c, problem) is None), key=rank)


def _first(op: Op, problem: Any, asked: Wish) -> Candidate:
    """Who comes first where all that are wanted can serve."""
    device = problem.device.type
    return next(
        candidate
        for candidate in op.candidates
        if candidate.made_for(device)
        and _left_out(candidate, problem, asked) is None
        and advice(candidate, problem) is None
    )


def _refuse_fallback(
    op: Op, problem: Any, asked: Wish, taken: Candidate, rejected: dict[str, str]
) -> None:
    first = _first(op, problem, asked)
    if first is not taken and first.name in rejected:
        raise UnsupportedKernel(
            f"{op.name}: {asked.source} allows no fallback, and {first.name!r}, the first choice "
            f"on {problem.device.type}, can't serve this call: {rejected[first.name]}. "
            f"{taken.name!r} could"
        )


def _proves(op: Op, candidate: Candidate, problem: Any, rejected: dict[str, str]) -> bool:
    """Whether `candidate` passes its self-test; else the reason is in `rejected`."""
    parity = _proof(op, candidate, problem)
    if isinstance(parity, str):
        rejected[candidate.name] = parity
    return not isinstance(parity, str)


def _proof(op: Op, candidate: Candidate, problem: Any) -> float | str | None:
    if candidate.name == EAGER:
        return None  # the definition
    return proven(op.name, op.self_test, candidate, problem)


def _choice(
    op: Op,
    candidate: Candidate,
    reason: str,
    rejected: dict[str, str],
    parity: float | None,
    times: dict[str, float],
) -> Choice:
    return Choice(
        op.name,
        candidate.name,
        reason,
        tuple(Rejection(c.name, rejected[c.name]) for c in op.candidates if c.name in rejected),
        parity,
        times.get(candidate.name),
        times.get(EAGER),
    )
