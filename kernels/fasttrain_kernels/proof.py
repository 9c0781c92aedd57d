"""A backend is proven on its device before it is first used.

Its self-test runs forward and backward on small fixed problems (ragged, with ignored rows) against
exact values; tens of milliseconds. Of the problems those are taken that hold the dtypes and forms
of the call in question. What it finds is kept (store.py), so that it runs once for a machine, its
driver and these kernels. CUDA C++ has a process of its own for that: an illegal access would leave
this one without its GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch

from fasttrain_kernels.memory import ran_out
from fasttrain_kernels.problem import form
from fasttrain_kernels.registry import Candidate
from fasttrain_kernels.store import Store, store_for

OTHER = "not part of this proof"
# Models round after each step where our kernels round once, and so do kernels made to be like them:
# up to four roundings where our limit has one.
PROVIDERS_LIMIT = 4.0
SECONDS = 300  # for a process of its own, which loads PyTorch first

_proving = threading.RLock()  # autograd's threads may all come for the first time at once


def proven(op: str, self_test: str, candidate: Candidate, problem: Any) -> float | str | None:
    """The parity of a backend that passed, else the reason why it may not be used.

    Runs the self-test where none is on record; a failure puts the backend in quarantine.
    """
    device = problem.device
    if not candidate.made_for(device.type):
        return None  # Triton's interpreter: for tests of the kernels themselves
    store = store_for(device.type, device.index)
    key = "|".join((op, candidate.name, *form(problem)))
    parity = store.get("parity", key)
    if parity is not None:
        return float(parity)
    with _proving:
        found = _found_meanwhile(op, candidate, key, store)
        return _run(op, self_test, candidate, problem, key, store) if found is None else found


def _found_meanwhile(op: str, candidate: Candidate, key: str, store: Store) -> float | str | None:
    """What another thread found while this one waited for it."""
    reason = store.quarantined(op, candidate.name)
    if reason is not None:
        return f"in quarantine: {reason}"
    parity: float | None = store.get("parity", key)
    return parity


def _run(
    op: str, self_test: str, candidate: Candidate, problem: Any, key: str, store: Store
) -> float | str:
    test = in_a_process if candidate.isolated else in_this_process
    trace = None
    try:
        with store.in_flight(op, candidate.name, "self-test"):
            parity = test(self_test, candidate.module, problem)
        if parity <= limit(candidate):
            store.put("parity", key, parity)
            return parity
        reason = f"its self-test is off by {parity:.3g} times what is allowed"
    except Exception as error:
        if ran_out(error):
            return "there is no memory left for its self-test"
        reason, trace = f"its self-test fails: {first_line(error)}", traceback.format_exc()
    store.quarantine(op, candidate.name, reason, trace)
    return reason


def full_parity(self_test: str, module: str, device: torch.device) -> float:
    """The worst error, in units of what is allowed, over every problem of a self-test."""
    parity: Callable[[Any, torch.device], float] = importlib.import_module(self_test).parity
    with _undisturbed(device):
        return parity(importlib.import_module(module), device)


def limit(candidate: Candidate) -> float:
    """What its parity may be."""
    return PROVIDERS_LIMIT if candidate.provider else 1.0


def in_this_process(self_test: str, module: str, problem: Any) -> float:
    """The worst error, in units of what is allowed, over the problems of this one's form."""
    return _parity(self_test, module, problem.device, form(problem))


def _parity(self_test: str, module: str, device: torch.device, wanted: tuple[str, ...]) -> float:
    kernel = importlib.import_module(module)
    parity: Callable[[Any, torch.device], float] = importlib.import_module(self_test).parity
    with _undisturbed(device):
        # Where no problem of this form is in the self-test, all of them speak for it.
        for forms in (wanted, None):
            only = _Only(kernel, forms)
            worst = parity(only, device)
            if only.tested:
                return worst
    raise RuntimeError("it serves nothing that its self-test holds")


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Whatever the process computes in: self-tests say themselves what is in which dtype, differ by
    roundings of float32, and wait for the GPU."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            default_on_cpu(),
            _whole_products(),
            allowed_to_wait(device),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)


def default_on_cpu() -> AbstractContextManager[object]:
    """Where the process makes tensors elsewhere unless told, they are made on the CPU inside.

    Else it is no context at all: torch.compile would make its code anew outside of one.
    """
    elsewhere = torch.get_default_device().type != "cpu"
    return torch.device("cpu") if elsewhere else nullcontext()


@contextmanager
def _whole_products() -> Iterator[None]:
    """float32 products of float32. PyTorch has two settings of that: the older sets the newer, and
    can't be read where the newer says what it can't."""
    newer = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in newer]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = None
    if older is not None:
        torch.set_float32_matmul_precision("highest")
    for setting in newer:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for setting, precision in zip(newer, before, strict=True):
            setting.fp32_precision = precision


@contextmanager
def allowed_to_wait(device: torch.device) -> Iterator[None]:
    """Where the process makes waiting for its GPU an error, these waits are none."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
        torch.cuda.synchronize(device)
    finally:
        torch.cuda.set_sync_debug_mode(before)


class _Only:
    """A kernel that refuses problems of another form, so that a self-test passes them over; with
    None, that only notes whether it was tested."""

    def __init__(self, kernel: ModuleType, wanted: tuple[str, ...] | None) -> None:
        self.kernel, self.wanted, self.tested = kernel, wanted, False

    def unsupported(self, problem: Any) -> str | None:
        if self.wanted is not None and form(problem) != self.wanted:
            return OTHER
        reason: str | None = self.kernel.unsupported(problem)
        self.tested = self.tested or reason is None
        return reason

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# --- in a process of its own ----------------------------------------------------------------------


def in_a_process(self_test: str, module: str, problem: Any) -> float:
    """The same, where a crash takes nothing else with it."""
    request = json.dumps([self_test, module, str(problem.device), form(problem)])
    done = subprocess.run(
        [sys.executable, "-m", __name__, request],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        raise RuntimeError(f"a process of its own ended with {done.returncode}: {last}")
    return float(json.loads(done.stdout.splitlines()[-1]))  # libraries may greet before it


def main() -> None:
    """Prints the parity that was asked for on the command line."""
    self_test, module, device, wanted = json.loads(sys.argv[1])
    print(json.dumps(_parity(self_test, module, torch.device(device), tuple(wanted))))


if __name__ == "__main__":
    main()
