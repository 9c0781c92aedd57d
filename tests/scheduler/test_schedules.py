"""The schedules against their formulas, and through torch on a real optimizer."""

import math

import pytest
import torch

from fasttrain.config.errors import UserError
from fasttrain.config.schema.scheduler import (
    ConstantConfig,
    CosineConfig,
    LinearConfig,
    WsdConfig,
)
from fasttrain.scheduler.constant import ConstantFactory
from fasttrain.scheduler.cosine import CosineFactory
from fasttrain.scheduler.linear import LinearFactory
from fasttrain.scheduler.wsd import WsdFactory

ALL = [
    (ConstantFactory, ConstantConfig),
    (LinearFactory, LinearConfig),
    (CosineFactory, CosineConfig),
    (WsdFactory, WsdConfig),
]
DECAYING = ALL[1:]


def factors(factory, config, total):
    return [factory(config).factor(step, total) for step in range(total)]


def test_constant():
    assert factors(ConstantFactory, ConstantConfig(), 4) == [1, 1, 1, 1]
    assert factors(ConstantFactory, ConstantConfig(warmup_steps=4), 6) == [0.25, 0.5, 0.75, 1, 1, 1]


def test_linear_is_a_straight_line_that_ends_just_after_the_last_step():
    assert factors(LinearFactory, LinearConfig(), 5) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    warmed = factors(LinearFactory, LinearConfig(warmup_steps=2, min_ratio=0.2), 6)
    assert warmed == pytest.approx([0.5, 1, 0.84, 0.68, 0.52, 0.36])


def test_cosine_is_half_a_cosine():
    total, warmup, ratio = 21, 5, 0.1
    found = factors(CosineFactory, CosineConfig(warmup_steps=warmup, min_ratio=ratio), total)
    for step, factor in enumerate(found):
        if step < warmup:
            expected = (step + 1) / warmup
        else:
            turn = math.pi * (step - (warmup - 1)) / (total - (warmup - 1))
            expected = ratio + (1 - ratio) * 0.5 * (1 + math.cos(turn))
        assert factor == pytest.approx(expected, rel=1e-12)


def test_wsd_stays_and_then_falls():
    found = factors(WsdFactory, WsdConfig(warmup_steps=2, decay_ratio=0.4, min_ratio=0.5), 10)
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.9, 0.8, 0.7, 0.6])


def test_wsd_that_only_decays_begins_at_the_peak():
    found = factors(WsdFactory, WsdConfig(decay_ratio=1.0), 5)
    assert found == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize(("factory", "section"), DECAYING)
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("total", [10, 37])
@pytest.mark.parametrize("warmup", [0, 1, 3, 9])
def test_the_peak_and_the_end_are_exact_and_every_step_learns(
    factory, section, ratio, total, warmup
):
    found = factors(factory, section(min_ratio=ratio, warmup_steps=warmup), total)
    assert max(found) == 1.0
    assert factory(section(min_ratio=ratio, warmup_steps=warmup)).factor(total, total) == ratio
    assert min(found) > 0.0
    assert all(a >= b for a, b in zip(found[warmup:], found[warmup + 1 :], strict=False))


@pytest.mark.parametrize(("factory", "section"), ALL)
def test_a_run_of_one_step_is_at_the_peak(factory, section):
    assert factors(factory, section(), 1) == [1.0]
    assert factors(factory, section(warmup_ratio=0.03), 1) == [1.0]


@pytest.mark.parametrize(("factory", "section"), ALL)
@pytest.mark.parametrize("after", [0, 1, 50])
def test_the_end_holds_beyond_the_horizon(factory, section, after):
    # torch asks for the step after the last one, too.
    built = factory(section(warmup_steps=2))
    assert built.factor(8 + after, 8) == built.factor(8, 8)


@pytest.mark.parametrize(("factory", "section"), ALL)
def test_a_share_is_rounded_to_steps(factory, section):
    by_ratio = factors(factory, section(warmup_ratio=0.29), 100)
    assert by_ratio == factors(factory, section(warmup_steps=29), 100)
    assert by_ratio[28] == 1.0 > by_ratio[27]


@pytest.mark.parametrize(("factory", "section"), ALL)
@pytest.mark.parametrize(
    ("warmup", "named"),
    [
        ({"warmup_steps": 10}, "scheduler.warmup_steps: 10 steps of warm-up"),
        ({"warmup_steps": 11}, "a run of 10 steps"),
        ({"warmup_ratio": 1.0}, "scheduler.warmup_ratio: 10 steps of warm-up"),
        ({"warmup_ratio": 0.1, "warmup_steps": 1}, "exclude each other"),
    ],
)
def test_a_warmup_that_does_not_fit_is_refused_at_build(factory, section, warmup, named):
    with pytest.raises(UserError, match=named):
        factory(section(**warmup)).build(optimizer(), total_steps=10)


def test_wsd_refuses_phases_that_do_not_fit():
    with pytest.raises(UserError, match=r"scheduler\.decay_ratio: 6 steps .* and 5 of decay"):
        WsdFactory(WsdConfig(warmup_steps=6, decay_ratio=0.5)).build(optimizer(), total_steps=10)
    WsdFactory(WsdConfig(warmup_steps=5, decay_ratio=0.5)).build(optimizer(), total_steps=10)


@pytest.mark.parametrize(("factory", "section"), ALL)
def test_a_real_optimizer_steps_at_the_formula_times_its_peaks(factory, section):
    total, stepper, built = 9, optimizer(), factory(section(warmup_steps=3))
    schedule = built.build(stepper, total_steps=total)
    for step in range(total):
        used = [group["lr"] for group in stepper.param_groups]
        assert used == [0.1 * built.factor(step, total), 0.02 * built.factor(step, total)]
        stepper.step()
        schedule.step()


def optimizer():
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.1},
        {"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.02},
    ]
    return torch.optim.AdamW(groups)
