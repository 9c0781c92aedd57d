"""What the op tests share: the places where each backend can run on this machine."""

import os
from typing import NamedTuple

import pytest
import torch
from fasttrain_kernels import fingerprint, selection
from fasttrain_kernels.registry import OPS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Providers that compile for seconds for each new dtype and option: their self-tests speak for them.
COMPILING = ("compile",)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def patch_once():
    """Triton's interpreter puts its own functions in the language's place anew for every device
    function that is called: a millisecond each, half of these tests' time. Once is enough: a launch
    does it for what its kernel names, and what device functions name is never put back."""
    from triton.runtime import interpreter

    patch, seen = interpreter._patch_lang, set()

    def call(self, *args, **kwargs):
        if self.fn not in seen:
            seen.add(self.fn)
            patch(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


if INTERPRETED:
    patch_once()


class Place(NamedTuple):
    """A backend, and the device that the test puts its tensors on."""

    backend: str
    device: str

    @property
    def truncating(self) -> bool:
        """Triton's interpreter rounds bfloat16 towards zero."""
        return self == ("triton", "cpu")

    @property
    def compiler(self) -> str:
        """A backend of torch.compile: "aot_eager" makes the graph, "inductor" code from it as well.

        The graph says which kernels to call in one argument of an opaque op, no more: code made
        from it for the reference or the interpreter would be the same but for that.
        """
        return "aot_eager" if self.truncating or self.backend == "eager" else "inductor"


def places_of(op):
    """Where an op's backends run here; in Triton's interpreter, that one alone."""
    if INTERPRETED:  # how test_interpreter.py runs these files in a process of its own
        names = [candidate.name for candidate in op.candidates if candidate.name == "triton"]
        return [pytest.param(Place(name, "cpu"), id=f"{name}-interpreted") for name in names]
    return [
        pytest.param(
            Place(candidate.name, device),
            id=candidate.name if device == "cpu" else f"{candidate.name}-{device}",
            marks=[pytest.mark.gpu] if device == "cuda" else [],
        )
        for device in DEVICES
        for candidate in op.candidates
        if candidate.made_for(device) and candidate.name not in COMPILING
    ]


def pytest_generate_tests(metafunc):
    """A test that asks for a `place` runs on each of the op that its file is named for."""
    if "place" in metafunc.fixturenames:
        file = metafunc.module.__name__.rpartition(".")[2]
        op = next(op for op in OPS.values() if file.startswith(f"test_{op.name}"))
        metafunc.parametrize("place", places_of(op))


@pytest.fixture
def as_if_proven(monkeypatch):
    """For tests that pretend a GPU: no self-test can run on it, and it has no name."""
    monkeypatch.setattr(selection, "proven", lambda *arguments: 0.5)
    monkeypatch.setattr(fingerprint, "device_name", lambda *arguments: "pretended")
    fingerprint.fingerprint.cache_clear()
    yield
    fingerprint.fingerprint.cache_clear()
