"""The arithmetic of batches and of the horizon."""

from types import SimpleNamespace

import pytest

from fasttrain.config.errors import UserError
from fasttrain.core.plan import plan_batches, plan_horizon


def config(**settings):
    defaults = {
        "micro_batch_size": 1,
        "gradient_accumulation_steps": None,
        "global_batch_size": None,
        "epochs": None,
        "max_steps": None,
        "data": SimpleNamespace(packing=True),
    }
    return SimpleNamespace(**{**defaults, **settings})


class TenStepsEach:
    def steps_in_epoch(self, epoch):
        return 10


@pytest.mark.parametrize(
    ("settings", "ranks", "accumulation", "total"),
    [
        ({}, 1, 1, 1),
        ({"micro_batch_size": 2, "gradient_accumulation_steps": 3}, 4, 3, 24),
        ({"micro_batch_size": 2, "global_batch_size": 16}, 1, 8, 16),
        ({"micro_batch_size": 2, "global_batch_size": 16}, 4, 2, 16),
        ({"global_batch_size": 4, "gradient_accumulation_steps": 4}, 1, 4, 4),
    ],
)
def test_the_global_batch_is_split(settings, ranks, accumulation, total):
    plan = plan_batches(config(**settings), ranks)
    assert (plan.accumulation, plan.global_batch_size) == (accumulation, total)


@pytest.mark.parametrize(
    ("settings", "ranks"),
    [
        ({"micro_batch_size": 3, "global_batch_size": 16}, 1),
        ({"micro_batch_size": 2, "global_batch_size": 16}, 3),
        ({"micro_batch_size": 4, "global_batch_size": 2}, 1),
        ({"global_batch_size": 4, "gradient_accumulation_steps": 3}, 1),
    ],
)
def test_a_remainder_shows_the_arithmetic(settings, ranks):
    with pytest.raises(UserError, match=r"global_batch_size: .* is not .* micro × "):
        plan_batches(config(**settings), ranks)


@pytest.mark.parametrize(
    ("settings", "steps", "reason"),
    [
        ({}, 10, "1 epochs (default)"),
        ({"epochs": 2.5}, 25, "2.5 epochs"),
        ({"epochs": 0.01}, 1, "0.01 epochs"),
        ({"max_steps": 7}, 7, "max_steps"),
        ({"epochs": 2.0, "max_steps": 7}, 7, "max_steps ends before 2 epochs (20 steps)"),
        ({"epochs": 2.0, "max_steps": 70}, 20, "2 epochs, before max_steps (70)"),
    ],
)
def test_the_horizon_ends_with_whichever_is_first(settings, steps, reason):
    horizon = plan_horizon(config(**settings), TenStepsEach())
    assert horizon.total_steps == steps
    assert reason in horizon.reason
