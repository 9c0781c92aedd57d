"""Steps of optimizers on every backend: against exact values, and what roundings come to."""

import contextlib
import importlib
import math
from dataclasses import replace

import pytest
import torch
from fasttrain_kernels import testing_optimizer
from fasttrain_kernels.ops.optimizer_step import codes
from fasttrain_kernels.ops.optimizer_step.random_bits import random_bits
from fasttrain_kernels.ops.optimizer_step.reference import Problem, rounded_at_random
from fasttrain_kernels.optim import SGD, AdamW, Lion
from fasttrain_kernels.registry import OPS
from fasttrain_kernels.testing import guarded
from fasttrain_kernels.testing_optimizer import (
    OFFSETS,
    SIZES,
    changed_by_skipping,
    parity_of,
    problems,
    random_step,
)

CPU = torch.device("cpu")
BF16 = torch.bfloat16
REFERENCE = importlib.import_module("fasttrain_kernels.ops.optimizer_step.reference")


def kernel_of(place):
    return OPS["optimizer_step"].candidate(place.backend).load()


def param(value):
    return "-".join(str(part).removeprefix("torch.") for part in value[1:-1])


def made(place, problem):
    """The problem on the place's device, and its kernel; skips where it doesn't serve."""
    kernel, here = kernel_of(place), problem._replace(device=torch.device(place.device))
    if (reason := kernel.unsupported(here)) is not None:
        pytest.skip(reason)
    return kernel, here


@pytest.mark.parametrize("problem", problems(REFERENCE, CPU), ids=param)
def test_a_step_is_exact_to_its_roundings(place, problem):
    kernel, problem = made(place, problem)
    work = random_step(problem, SIZES, offsets=OFFSETS)
    assert parity_of(kernel, work) <= 1
    assert parity_of(kernel, work) <= 1  # the same again, from where the first has led
    assert parity_of(kernel, random_step(problem, (5, 0, 700), max_norm=0)) <= 1
    assert not changed_by_skipping(kernel, random_step(problem, (5, 700)))


def test_all_that_rounds_at_random_has_the_same_bits_everywhere(place):
    for moments in ("bfloat16", "8bit"):
        kernel, problem = made(place, Problem(CPU, BF16, BF16, "sgd", "stochastic", moments))
        one, other = random_step(problem, SIZES), random_step(problem, SIZES)
        kernel.step(one)
        REFERENCE.step(other)
        for mine, theirs in zip(one.slots, other.slots, strict=True):
            # A last bit of float32 can decide a rounding, of one in 65536.
            assert (mine.param != theirs.param).sum() <= 1 + mine.param.numel() // 4096
            assert (mine.first != theirs.first).sum() <= 1 + mine.first.numel() // 4096


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32, "none"), (BF16, BF16, "master")], ids=["fp32", "bf16"]
)
def test_a_flag_on_the_device_skips_and_a_gradient_is_cleared(place, dtypes):
    dtype, grad_dtype, rounding = dtypes
    kernel, problem = made(place, Problem(CPU, dtype, grad_dtype, "adamw", rounding, "float32"))
    work = random_step(problem, (40,))
    before = work.slots[0].param.clone()
    kernel.step(replace(work, skip=torch.ones((), device=problem.device)))
    assert torch.equal(work.slots[0].param, before)
    assert work.slots[0].grad.abs().min() > 0
    kernel.step(replace(work, zero_grad=True))
    assert not torch.equal(work.slots[0].param, before)
    assert work.slots[0].grad.abs().max() == 0


@pytest.mark.parametrize("moments", ["float32", "bfloat16", "8bit"])
def test_nothing_is_written_beyond_a_tensor(place, moments):
    if place.device != "cpu":
        pytest.skip("guards are made on CPUs")
    kernel, problem = made(place, Problem(CPU, BF16, BF16, "adamw", "kahan", moments))
    work = random_step(problem, (777,))
    slot = work.slots[0]
    names = [name for name, value in vars(slot).items() if isinstance(value, torch.Tensor)]
    with contextlib.ExitStack() as stack:
        for name in names:
            setattr(slot, name, stack.enter_context(guarded(getattr(slot, name))))
        assert parity_of(kernel, work) <= 1
        for name in names:
            setattr(slot, name, getattr(slot, name).clone())


# --- roundings ------------------------------------------------------------------------------------


def draws(count, use=0, step=3):
    number = torch.arange(count)
    return random_bits(7, 2, torch.tensor(float(step)), number, use)


def test_random_bits_are_uniform_and_independent():
    count = 1 << 16
    bits = draws(count)
    assert int(bits.min()) >= 0 and int(bits.max()) < 1 << 16
    # Of each of the 16 bits, of neighbours, of steps, and of both uses: as often alike as not, to
    # four standard deviations.
    allowed = 4 * math.sqrt(count) / 2
    others = (torch.zeros(count).long(), bits.roll(1), bits.roll(256), draws(count, step=4))
    for other in (*others, draws(count, use=1)):
        for bit in range(16):
            alike = ((bits ^ other) >> bit & 1).sum()
            assert abs(float(alike) - count / 2) < allowed, (bit, float(alike))


def test_rounding_to_bfloat16_is_unbiased():
    count = 1 << 16
    for value in (1.003, -77.77, 3e-39, 1e-5):
        kept = rounded_at_random(torch.full((count,), value), draws(count)).double()
        exact = float(torch.tensor(value))
        step = float(kept.max() - kept.min())
        assert len(kept.unique()) == 2
        assert abs(float(kept.mean()) - exact) < 4 * step / 2 / math.sqrt(count)
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
    kept = rounded_at_random(special, torch.full((4,), 0xFFFF)).float()
    assert kept[0] == math.inf and kept[1] == -math.inf and kept[2].isnan() and kept[3] == 0


@pytest.mark.parametrize(
    ("encode", "decode"),
    [(codes.first_codes, codes.firsts_of), (codes.root_codes, codes.roots_of)],
)
def test_codes_of_8_bits_are_unbiased_and_keep_what_they_stand_for(encode, decode):
    count = 1 << 16
    signs = (1, -1) if encode is codes.first_codes else (1,)
    for share in (1.0, 0.93, 0.5, 0.01, 3e-5):
        for sign in signs:
            values = torch.full((count,), share * sign * 0.7)
            scale = torch.full((count // codes.BLOCK,), 1.0)
            kept = decode(encode(values, scale, 0, draws(count, 1)), scale, 0).double()
            step = float(kept.max() - kept.min())
            assert step <= abs(share) / 8 + 2**-16
            assert abs(float(kept.mean() - values[0])) <= 4 * step / 2 / math.sqrt(count) + 1e-12
    # Each code, decoded and encoded again, is itself: with its scale, and with any other power of
    # two that it fits.
    every = torch.arange(256, dtype=torch.uint8)
    for power in (1.0, 2.0**-40, 2.0**60):
        scale = torch.tensor([power])
        again = encode(decode(every, scale, 0), scale, 0, torch.zeros(256).long())
        assert torch.equal(again, every)


def test_the_scale_of_a_block_leaves_room_for_rounding_up():
    edges = torch.tensor([1.0, 0.875, 0.8749, 0.93, 0.9375, 0.9376, 1.75, 1e-37, 3e38])
    for largest in edges.tolist():
        values = torch.tensor([largest, largest / 3])
        for encode, decode in (
            (codes.first_codes, codes.firsts_of),
            (codes.root_codes, codes.roots_of),
        ):
            scale = codes.scale_of(values, 0)
            kept = decode(encode(values, scale, 0, torch.full((2,), 0xFFFF)), scale, 0)
            if largest < 1e38:  # beyond, sums of squares overflow anyway
                assert kept[0] >= values[0]
                assert kept[0] <= values[0] * 1.15
    for nothing in (0.0, 1e-38):  # its inverse would be infinite
        assert codes.scale_of(torch.full((5,), nothing), 3).tolist() == [0.0]


def test_a_moment_that_barely_changes_is_followed_on_average():
    """Rounded to nearest, a mean that moves by 0.1 % a step would stand still for ever."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(4096))
    optimizer = AdamW([parameter], lr=0.0, betas=(0.9, 0.999), moments="8bit")
    for step in range(3000):
        parameter.grad = torch.full((4096,), 1.0 if step < 1500 else 0.25)
        optimizer.step()
    state = optimizer.state[parameter]
    root = codes.roots_of(state["exp_avg_sq"], state["exp_avg_sq_scale"], 0)
    exact = math.sqrt(1 - 0.999**1500) * 0.999**750
    exact = math.sqrt(exact**2 + (1 - 0.999**1500) / 16)
    assert abs(float(root.mean()) / exact - 1) < 0.02
    assert float(root.std()) / exact < 0.15
    mean = codes.firsts_of(state["exp_avg"], state["exp_avg_scale"], 0)
    assert abs(float(mean.mean()) / 0.25 - 1) < 0.01


def test_errors_name_what_is_wrong():
    for options, message in (
        ({"lr": -1.0}, r"lr=-1\.0; expected 0 or more"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0\.9, 1\.0\); expected"),
        ({"moments": "4bit"}, r"moments='4bit'; expected one of float32, bfloat16, 8bit"),
        ({"rounding": "up"}, r"rounding='up'; expected one of master, stochastic, kahan"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm=0\.0; expected more than 0, or None"),
    ):
        with pytest.raises(ValueError, match=message):
            AdamW([torch.nn.Parameter(torch.zeros(3))], **options)
    with pytest.raises(ValueError, match="nesterov=True needs momentum"):
        SGD([torch.nn.Parameter(torch.zeros(3))], nesterov=True)
    with pytest.raises(ValueError, match="momentum=1"):
        SGD([torch.nn.Parameter(torch.zeros(3))], momentum=1)
    with pytest.raises(ValueError, match="eps=-1"):
        AdamW([torch.nn.Parameter(torch.zeros(3))], eps=-1)
    with pytest.raises(ValueError, match="int64, which has no step"):
        Lion([torch.zeros(3).long()])
    parameter = torch.nn.Parameter(torch.zeros(3, 2))
    parameter.grad = torch.zeros(3, 2).to_sparse()
    with pytest.raises(ValueError, match="sparse=False"):
        Lion([parameter]).step()


def test_the_limits_find_a_wrong_step():
    """Each part of a step is found where it is a little wrong."""

    class Off:
        def __init__(self, name, factor):
            self.name, self.factor = name, factor

        def step(self, work):
            REFERENCE.step(work)
            for slot in work.slots:
                getattr(slot, self.name).mul_(self.factor)

    problem = Problem(CPU, BF16, BF16, "adamw", "master", "float32")
    for name, factor in (
        ("param", 1 + 2**-6),
        ("beside", 1 + 2**-20),
        ("first", 1 + 2**-20),
        ("second", 1 + 2**-20),
        ("step", 2),
    ):
        assert testing_optimizer.parity_of(Off(name, factor), random_step(problem, (300,))) > 1
