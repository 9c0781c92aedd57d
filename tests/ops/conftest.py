"""What the op tests share: the places where each backend can run on this machine."""

import os
from typing import NamedTuple

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Place(NamedTuple):
    """A backend, and the device that the test puts its tensors on."""

    backend: str
    device: str

    @property
    def truncating(self) -> bool:
        """Triton's interpreter rounds bfloat16 towards zero."""
        return self == ("triton", "cpu")


PLACES = [
    pytest.param(Place("cpu", "cpu"), id="cpu"),
    pytest.param(Place("eager", "cpu"), id="eager"),
]
if torch.cuda.is_available():
    PLACES += [
        pytest.param(Place("triton", "cuda"), id="triton-cuda", marks=pytest.mark.gpu),
        pytest.param(Place("eager", "cuda"), id="eager-cuda", marks=pytest.mark.gpu),
    ]
if INTERPRETED:  # how test_interpreter.py runs these files in a process of its own
    PLACES = [pytest.param(Place("triton", "cpu"), id="triton-interpreted")]


@pytest.fixture(params=PLACES)
def place(request):
    return request.param
