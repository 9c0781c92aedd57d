"""The state of every random generator that training draws from, as tensors."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

_PYTHON_VERSION = 3  # of the tuple that random.getstate() returns
_NO_GAUSS = float("nan")  # stands for "no second normal deviate is kept"


def seed_everything(seed: int) -> None:
    """Seed Python, numpy, torch on the CPU and on every CUDA device. `seed` in [0, 2³²)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> dict[str, Tensor]:
    """The present state of every generator, by name.

    `python`, `numpy` (n,) int64 and `python.gauss`, `numpy.gauss` () float64: Mersenne Twisters and
    their pending normal deviate (NaN: none). `torch`, `cuda.<index>` (n,) uint8, the latter where
    this process has used CUDA: asking would take memory on every GPU.
    """
    version, words, gauss = random.getstate()
    assert version == _PYTHON_VERSION, f"random.getstate() has version {version}"
    kind, key, position, has_gauss, numpy_gauss = np.random.get_state()
    assert kind == "MT19937", f"numpy's global generator is {kind}"
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python.gauss": _scalar(_NO_GAUSS if gauss is None else gauss),
        "numpy": torch.tensor([*map(int, key), int(position)], dtype=torch.int64),
        "numpy.gauss": _scalar(float(numpy_gauss) if has_gauss else _NO_GAUSS),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        for index, cuda in enumerate(torch.cuda.get_rng_state_all()):
            state[f"cuda.{index}"] = cuda
    return state


def set_random_state(state: dict[str, Tensor]) -> tuple[str, ...]:
    """Put every generator back. Returns the CUDA devices whose generator could not be: those of
    `state` that are not here, and those here that `state` does not know."""
    words = tuple(state["python"].tolist())
    gauss = state["python.gauss"].item()
    random.setstate((_PYTHON_VERSION, words, None if gauss != gauss else gauss))
    *key, position = state["numpy"].tolist()
    gauss = state["numpy.gauss"].item()
    has_gauss = int(gauss == gauss)
    np.random.set_state(
        ("MT19937", np.array(key, dtype=np.uint32), position, has_gauss, gauss if has_gauss else 0)
    )
    torch.set_rng_state(state["torch"])
    here = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    devices = {f"cuda.{index}" for index in range(here)}
    known = {name for name in state if name.startswith("cuda.")}
    for name in devices & known:
        torch.cuda.set_rng_state(state[name], int(name.removeprefix("cuda.")))
    return tuple(sorted(devices ^ known))


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
