"""Runs each call of an op on the backend that was chosen for it.

A call is described by a problem (problem.py); selection.py decides, from it and from what was asked
(settings.py), and the decision is remembered. A backend that fails in a call is set aside for good,
and the call is made on the next one: `Op.run`.

`choose` and `explain` are for people, and for a trainer that plans its model: they say why.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Hashable
from types import ModuleType
from typing import Any

import torch

from fasttrain_kernels import store
from fasttrain_kernels.guard import Call, Chosen, capturing, is_finite, is_lost
from fasttrain_kernels.memory import ran_out
from fasttrain_kernels.proof import first_line
from fasttrain_kernels.registry import OPS, Candidate, find
from fasttrain_kernels.selection import Choice, decide
from fasttrain_kernels.settings import AUTO, CALLER, EAGER, STRICT, Settings, in_force, wish
from fasttrain_kernels.store import store_for
from fasttrain_kernels.timing import Sizes

# What `choose` takes beside facts.
OPTIONS = ("in_model", "autotune", "deterministic", "providers")


class KernelFailure(RuntimeError):  # noqa: N818  (what UnsupportedKernel is to choosing)
    """A backend failed in a call that can't be made on another one."""


class Op:
    """An operator and its backends, in order of preference; "eager" is added as the last.

    `describe(**facts)` makes a problem. In `folder` lie the modules `reference`, the definition;
    `self_test`, `parity(kernel, device) -> float`; and `workload`, what a timing pass runs.
    `example` holds facts of a typical problem beyond device and dtype, for tables that describe no
    model.
    """

    def __init__(
        self,
        name: str,
        candidates: tuple[Candidate, ...],
        folder: str,
        describe: Callable[..., Any],
        example: dict[str, Any],
    ) -> None:
        assert name not in OPS, f"op {name!r} is defined twice"
        self.name = name
        self.candidates = (*candidates, Candidate(EAGER, f"{folder}.reference", ()))
        self.self_test = f"{folder}.self_test"
        self.workload = f"{folder}.workload"
        self.describe = describe
        self.example = example
        self.aside: set[str] = set()  # backends that have failed, and are not judged yet
        self._selected: dict[Hashable, Chosen] = {}
        OPS[name] = self

    def candidate(self, name: str) -> Candidate:
        return next(candidate for candidate in self.candidates if candidate.name == name)

    def choose(
        self,
        problem: Any,
        requested: str = AUTO,
        mode: str | None = None,
        source: str = CALLER,
        *,
        sizes: Sizes | None = None,
        in_model: bool = False,
        **options: Any,
    ) -> Choice:
        """The row of the table for `problem`; `source` is who asks, for reasons and errors.

        sizes: as they are, for a timing pass. in_model: "eager" is what a model does by itself,
        rather than the op's reference. options: `autotune`, `deterministic` and `providers`, as
        `use` has them.
        """
        named = () if requested == AUTO else ((self.name, requested),)
        caller = Settings(source, mode, named, **options)
        return decide(self, problem, wish(self.name, caller), sizes, in_model=in_model)

    def select(self, problem: Any, backend: str) -> Chosen:
        """The backend that serves `problem` now: a look-up, after the first time. Raises as
        `choose` does."""
        key = (problem, backend, in_force())
        chosen = self._selected.get(key)
        if chosen is None:
            chosen = self._decided(problem, backend)
            if not capturing(problem.device):
                self._selected[key] = chosen
        return chosen

    def run(
        self, phase: str, problem: Any, backend: str, call: Call, *, repeatable: bool = True
    ) -> Any:
        """`call(module)` on the backend that serves `problem`; `phase`: "forward" or "backward".

        Where that fails the call is made on another one, unless it isn't `repeatable`, for it
        writes over what it reads.
        """
        chosen = self.select(problem, backend)
        if chosen.candidate.name == EAGER:
            return call(chosen.module)
        try:
            result = chosen.call(phase, call)
        except Exception as error:
            return self._after(error, chosen, phase, backend, call if repeatable else None)
        looked_at = repeatable and chosen.is_to_be_checked(phase)
        if looked_at and not is_finite(result, problem.device):
            return self._compared(result, chosen, phase, call)
        return result

    def forget(self) -> None:
        """Drop remembered selections, after something that they rest on has changed."""
        self._selected.clear()

    def quarantine(
        self, backend: str, device: torch.device, reason: str, trace: str | None = None
    ) -> None:
        """Never take `backend` on such a device again."""
        store_for(device.type, device.index).quarantine(self.name, backend, reason, trace)
        self.forget()

    def _decided(self, problem: Any, backend: str) -> Chosen:
        asked = wish(self.name, Settings(CALLER, None, ((self.name, backend),)))
        taken = decide(self, problem, asked).backend
        alone = asked.named or asked.mode == STRICT
        return Chosen(self.name, self.candidate(taken), problem, alone)

    def _reference(self) -> ModuleType:
        module = self.candidate(EAGER).load()
        assert isinstance(module, ModuleType)
        return module

    # --- a call that has failed ------------------------------------------------------------------

    def _after(
        self, error: Exception, chosen: Chosen, phase: str, backend: str, call: Call | None
    ) -> Any:
        """What the call that raised `error` gives elsewhere; raises where it can't be made."""
        device, name = chosen.problem.device, chosen.candidate.name
        if ran_out(error):
            raise error
        trace = traceback.format_exc()
        reason = f"its {phase} pass fails: {first_line(error)}"
        if is_lost(error, device):
            if not chosen.has_launched(phase):  # it was waited for, so that it is to blame
                self.quarantine(name, device, reason, trace)
            raise error
        result = None if call is None else self._elsewhere(error, chosen, phase, backend, call)
        self.quarantine(name, device, reason, trace)
        if chosen.alone or call is None:
            raise KernelFailure(f"{self.name}: backend {name!r}: {reason}") from error
        return result

    def _elsewhere(
        self, error: Exception, chosen: Chosen, phase: str, backend: str, call: Call
    ) -> Any:
        """The call on another backend. What fails there too is the call's own fault."""
        self.aside.add(chosen.candidate.name)
        try:
            if chosen.alone:  # whoever asked for it would be asked again
                return call(self._reference())
            return self._decided(chosen.problem, backend).call(phase, call)
        except Exception as another:
            if ran_out(another):
                raise
            raise error from None
        finally:
            self.aside.discard(chosen.candidate.name)
            self.forget()  # what another thread may have chosen meanwhile

    def _compared(self, result: Any, chosen: Chosen, phase: str, call: Call) -> Any:
        """`result`, which is not finite, if the reference's isn't either; else the reference's."""
        try:
            expected = call(self._reference())
        except Exception as error:
            if ran_out(error):
                return result
            raise
        if not is_finite(expected, chosen.problem.device):
            return result
        name = chosen.candidate.name
        reason = f"its {phase} pass gives values that are not finite, where the reference's are"
        self.quarantine(name, chosen.problem.device, reason)
        if chosen.alone:
            raise KernelFailure(f"{self.name}: backend {name!r}: {reason}")
        return expected


def choose(
    op: str, *, requested: str = AUTO, mode: str | None = None, source: str = CALLER, **facts: Any
) -> Choice:
    """The backend that calls of `op` with these facts would run on, and why, without running it.

    `facts` are what the op's problem is made of; for rms_norm: `device`, `dtype`, `width`, and
    where they differ from the default `weight_dtype`, `residual_dtype`, `style`; and `rows`, which
    times are kept by. Beside them `autotune`, `deterministic` and `providers`, as `use` has them;
    `lengths` of documents, for a timing pass; and `in_model`, for "eager" as a model's own code. No
    tensors are needed.

    `requested` is what the caller would pass as `backend=`; `use()` and FASTTRAIN_KERNELS go before
    it and before `mode`. `source` names the caller in reasons and errors. What has no self-test on
    record runs it.

    Raises UnsupportedKernel where the backend asked for can't serve (mode "strict": where the
    first choice can't), ValueError for unknown names.
    """
    options = {name: facts.pop(name) for name in OPTIONS if name in facts}
    sizes = Sizes(facts.get("rows", 0), facts.pop("lengths", ()))
    problem = find(op).describe(**facts)
    return find(op).choose(problem, requested, mode, source, sizes=sizes, **options)


def explain(op: str | None = None, **facts: Any) -> tuple[Choice, ...]:
    """Rows of the kernel table: for `op`, or for every op on a typical problem.

    Takes what `choose` takes, and raises what it raises. For every op, give only `device` and
    `dtype` (and `requested`, `mode`).
    """
    if op is not None:
        return (choose(op, **facts),)
    return tuple(choose(name, **OPS[name].example, **facts) for name in sorted(OPS))


def quarantine(
    op: str, backend: str, reason: str, *, device: torch.device | str | None = None
) -> None:
    """Never take a backend of an op again, until it is reset: for faults that no self-test sees.

    device: where; by default wherever there is a device that the backend is made for. ValueError
    for unknown names.
    """
    found = find(op)
    names = [candidate.name for candidate in found.candidates if candidate.name != EAGER]
    if backend not in names:
        raise ValueError(f"{op} has no backend {backend!r}; it has {', '.join(names)}")
    here = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for place in here if device is None else (device,):
        if found.candidate(backend).made_for(torch.device(place).type):
            found.quarantine(backend, torch.device(place), reason)


def reset(op: str | None = None, backend: str | None = None) -> None:
    """Forget proofs, times and quarantines: all of them, an op's, or those of a backend of it.

    ValueError for an op that doesn't exist.
    """
    if op is not None:
        find(op)
    store.reset(op, backend)
    for known in OPS.values():
        known.forget()
