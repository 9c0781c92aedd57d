"""Random draws go on exactly where a saved state left them."""

import random

import numpy as np
import pytest
import torch

from fasttrain.runtime.random_state import random_state, seed_everything, set_random_state


def draws():
    """Draws that pass through every generator, the pending normal deviates included."""
    return (
        [random.random() for _ in range(3)],
        random.gauss(0, 1),
        np.random.standard_normal(3).tolist(),
        np.random.randint(0, 1000, 3).tolist(),
        torch.randn(5).tolist(),
        torch.dropout(torch.ones(20), 0.5, True).tolist(),
    )


@pytest.mark.parametrize("drawn_before", [0, 1, 2])
def test_a_round_trip_repeats_every_draw(drawn_before):
    seed_everything(3)
    for _ in range(drawn_before):
        draws()
    state = {name: tensor.clone() for name, tensor in random_state().items()}
    first = draws()
    assert draws() != first
    assert set_random_state(state) == ()
    assert draws() == first


def test_a_pending_normal_deviate_survives():
    seed_everything(3)
    random.gauss(0, 1), np.random.standard_normal()  # each makes two and keeps one
    state = random_state()
    assert state["python.gauss"].isfinite() and state["numpy.gauss"].isfinite()
    first = random.gauss(0, 1), np.random.standard_normal()
    set_random_state(state)
    assert (random.gauss(0, 1), np.random.standard_normal()) == first


def test_the_same_seed_gives_the_same_draws_and_another_gives_others():
    seed_everything(7)
    first = draws()
    seed_everything(7)
    assert draws() == first
    seed_everything(8)
    assert draws() != first


def test_reading_the_state_draws_nothing():
    seed_everything(7)
    random_state()
    first = draws()
    seed_everything(7)
    assert draws() == first


def test_a_device_that_is_not_here_is_named():
    state = random_state()
    state["cuda.17"] = torch.zeros(16, dtype=torch.uint8)
    assert set_random_state(state) == ("cuda.17",)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_repeats_its_draws():
    torch.cuda.init()
    seed_everything(3)
    state = random_state()
    first = torch.randn(8, device="cuda")
    set_random_state(state)
    assert torch.equal(torch.randn(8, device="cuda"), first)
