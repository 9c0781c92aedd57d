"""Exact steps of optimizers in float64, and how far from them a backend may be.

One step, from a state as it is stored. Arithmetic in float32 makes a few roundings of each term;
what is rounded at random is one of both neighbours, so off by less than their distance: 1/128 of a
bfloat16's size, 1/16 and 1/8 of the sizes that codes of 8 bits stand for. What is below the least
code, 2^-16 of its block's scale, is off by that.
"""

import copy
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from fasttrain_kernels.ops.optimizer_step import codes, reference
from fasttrain_kernels.ops.optimizer_step.reference import Problem
from fasttrain_kernels.ops.optimizer_step.step import BLOCK, Numbers, Slot, Step
from fasttrain_kernels.ops.optimizer_step.table import Table
from fasttrain_kernels.testing import ROUNDOFF, Expected

NUMBERS = {
    "adamw": Numbers(3e-2, 0.9, 0.99, 1e-8, 0.1),
    "lion": Numbers(1e-3, 0.9, 0.99, 0.0, 0.1),
    "sgd": Numbers(3e-2, 0.9, 0.5, 0.0, 0.1, nesterov=1.0),
}
ROUNDINGS = 6  # that a term of a moment or of a step goes through, at most


def random_step(
    problem: Problem, sizes: Sequence[int], *, offsets: Sequence[int] = (), max_norm: float = 1.0
) -> Step:
    """A step in the middle of a training: one slot of each size, its values of several magnitudes.

    The norm is 3, whatever the gradients' is, so that with max_norm a third of them is taken.
    """
    generator = torch.Generator().manual_seed(len(problem.algorithm) * 7919 + sum(sizes))
    offsets = offsets or [0] * len(sizes)
    slots = [
        _slot(problem, size, offset, number, generator)
        for number, (size, offset) in enumerate(zip(sizes, offsets, strict=True))
    ]
    numbers = [NUMBERS[problem.algorithm], NUMBERS[problem.algorithm]._replace(weight_decay=0.0)]
    return Step(
        problem.algorithm,  # type: ignore[arg-type]
        problem.rounding,  # type: ignore[arg-type]
        problem.moments,  # type: ignore[arg-type]
        slots,
        torch.tensor(numbers, dtype=torch.float64).to(problem.device),
        Table(),
        norm=torch.tensor(3.0, device=problem.device),
        max_norm=max_norm,
        grad_scale=torch.tensor(0.5, device=problem.device),
        seed=7,
    )


def _slot(
    problem: Problem, size: int, offset: int, number: int, generator: torch.Generator
) -> Slot:
    def normal(dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(size, generator=generator) * scale
        return drawn.to(problem.device, dtype)

    wide = torch.float64 if problem.dtype == torch.float64 else torch.float32
    param = normal(problem.dtype)
    size_of_gradients = 10.0 ** -(number % 4)
    first = normal(wide, size_of_gradients)
    second = normal(wide, size_of_gradients).square() + first.square() * 0.01
    slot = Slot(
        param,
        normal(problem.grad_dtype, size_of_gradients),
        torch.tensor(float(number), device=problem.device),
        None,
        None,
        None,
        None,
        None,
        stream=number,
        offset=offset,
        group=number % 2,
    )
    if problem.rounding == "master":
        # Not the parameter itself: a step must begin from the master.
        slot.beside = param.float() + normal(torch.float32, 2.0**-12)
    if problem.rounding == "kahan":
        slot.beside = normal(problem.dtype, 2.0**-12)
    stored = {"float32": wide, "bfloat16": torch.bfloat16}.get(problem.moments)
    if stored is not None:
        slot.first, slot.second = first.to(stored), second.to(stored)
    elif problem.moments == "8bit":
        half = torch.full((size,), 1 << 15, device=problem.device)
        slot.first_scale = codes.scale_of(first.abs(), slot.lead)
        slot.first = codes.first_codes(first, slot.first_scale, slot.lead, half)
        slot.second_scale = codes.scale_of(second.sqrt(), slot.lead)
        slot.second = codes.root_codes(second.sqrt(), slot.second_scale, slot.lead, half)
    if problem.algorithm != "adamw":
        slot.second = slot.second_scale = None
    return slot


def parity_of(kernel: ModuleType, work: Step) -> float:
    """Makes the step by `kernel`, and returns the worst error in units of what is allowed."""
    expected = [_expected(slot, work) for slot in work.slots]
    counts = [float(slot.step) for slot in work.slots]
    kernel.step(work)
    worst = 0.0
    for slot, count, values in zip(work.slots, counts, expected, strict=True):
        if float(slot.step) != count + 1:
            return float("inf")
        worst = max(worst, *(e.ratio(a) for a, e in zip(_stored(slot, work), values, strict=True)))
    return worst


def changed_by_skipping(kernel: ModuleType, work: Step) -> bool:
    """Whether a step of a norm that is infinite changes any bit."""
    assert work.norm is not None
    work.norm.fill_(torch.inf)
    before = copy.deepcopy(list(work.slots))
    kernel.step(work)
    return any(
        not torch.equal(was, now)
        for one, other in zip(before, work.slots, strict=True)
        for was, now in zip(_tensors(one), _tensors(other), strict=True)
    )


def _tensors(slot: Slot) -> list[Tensor]:
    return [value for value in vars(slot).values() if isinstance(value, Tensor)]


def _stored(slot: Slot, work: Step) -> list[Tensor]:
    """What a slot holds, decoded, in float64: its parameter, then what else there is."""
    param = slot.param.double()
    if work.rounding == "kahan" and slot.beside is not None:
        param = param + slot.beside.double()
    values = [param]
    if work.rounding == "master" and slot.beside is not None:
        values.append(slot.beside.double())
    moments = reference.moments_of(slot, work.moments)
    return values + [moment.double() for moment in moments if moment is not None]


def _expected(slot: Slot, work: Step) -> list[Expected]:
    """Exact values of what _stored will give."""
    compute = (
        ROUNDINGS * ROUNDOFF[torch.float64 if slot.param.dtype == torch.float64 else torch.float32]
    )
    numbers = Numbers(*work.numbers[slot.group].tolist())
    values = [value.cpu() for value in _stored(slot, work)]
    lacking = torch.zeros(()) if slot.beside is None else slot.beside.double().cpu()
    param = values[1] if work.rounding == "master" else slot.param.double().cpu()
    moments = values[-2 if slot.second is not None else -1 :] if slot.first is not None else []
    first, second = (*moments, None, None)[:2]
    grad = slot.grad.double().cpu() * reference.factor_of(work, numbers, torch.float64).cpu()
    rule = reference.RULES[work.algorithm]
    moved = rule(param, grad, first, second, numbers, slot.step.double().cpu() + 1)

    # How large the terms are, of which each rounding is a share.
    decay, rate = float(moved.decay), numbers.lr
    size = grad.abs() + numbers.weight_decay * param.abs() + (0 if first is None else first.abs())
    error = compute * size
    if work.algorithm == "adamw":
        assert moved.first is not None
        count = float(slot.step) + 1
        share = torch.where(moved.first == 0, 0.0, moved.change / moved.first).abs()
        change = share * error + compute * moved.change.abs()
        rate /= 1 - numbers.beta1**count
    elif work.algorithm == "lion":
        mix = first * numbers.beta1 + grad * (1 - numbers.beta1)  # type: ignore[operator]
        change = torch.where(mix.abs() <= error, 2 * rate, compute * rate)
    else:
        change = 3 * rate * error
    new = param * decay - moved.change
    if work.rounding == "kahan":
        new = new + lacking
    arithmetic = compute * (param.abs() + new.abs() + moved.change.abs()) + change
    narrow = ROUNDOFF.get(slot.param.dtype, 0.0)
    roundings = {
        "none": 0.0,
        "master": narrow,
        "stochastic": 2 * narrow,
        "kahan": 2 * narrow**2,
    }[work.rounding]
    expected = [Expected(new, arithmetic + roundings * (param.abs() + new.abs()))]
    if work.rounding == "master":
        expected.append(Expected(new, arithmetic))
    if moved.first is not None:
        off = error + _rounding_of(moved.first, work.moments, slot, 1 / 8)
        expected.append(Expected(moved.first, off))
    if moved.second is not None:
        off = compute * moved.second.abs() + _rounding_of(moved.second, work.moments, slot, 1 / 16)
        expected.append(Expected(moved.second, off))
    return expected


def _rounding_of(value: Tensor, moments: str, slot: Slot, step: float) -> Tensor:
    """How far from `value` a moment may be that is stored in fewer bits; `step`: of its codes."""
    if moments == "bfloat16":
        return 2 * ROUNDOFF[torch.bfloat16] * value.abs()
    if moments != "8bit":
        return torch.zeros_like(value)
    is_root = step == 1 / 16
    size = (value.sqrt() if is_root else value.abs()).float()
    scale = codes.spread(codes.scale_of(size, slot.lead), slot.lead, value.numel()).double()
    # The scale may be the next one, where the largest value is at the edge of it.
    least = 2 * scale / 65536
    if not is_root:
        return step * (size.double() + least)
    off = step * size.double() + least
    return 2 * size.double() * off + off.square()


def problems(kernel: ModuleType, device: torch.device) -> list[Problem]:
    """What `kernel` serves of every algorithm, rounding and kind of moments."""
    bf16, f32, f64 = torch.bfloat16, torch.float32, torch.float64
    dtypes = [
        (f32, f32, "none"),
        (f64, f64, "none"),
        (bf16, bf16, "master"),
        (bf16, f32, "master"),
        (bf16, bf16, "stochastic"),
        (bf16, f32, "stochastic"),
        (bf16, bf16, "kahan"),
        (torch.float16, torch.float16, "master"),
    ]
    every = [
        Problem(device, dtype, grad_dtype, algorithm, rounding, moments)
        for algorithm in NUMBERS
        for dtype, grad_dtype, rounding in dtypes
        for moments in ("float32", "bfloat16", "8bit", "none")
        if moments != "none" or algorithm == "sgd"
        if dtype != f64 or moments in ("float32", "none")
    ]
    return [problem for problem in every if kernel.unsupported(problem) is None]


# One element; less than a block; from within a block on, over its edges; two units of work.
SIZES, OFFSETS = (1, 100, 3 * BLOCK, 16500), (0, 0, 4 * BLOCK + 100, 0)


def norm_expected(gradients: Sequence[Tensor]) -> Expected:
    """The norm () of gradients. Sums of 1024 squares in float32, 32 of them one after the other in
    a lane, are off by some 6 roundings of their size, half of it for the root."""
    squares = sum(float(gradient.double().square().sum()) for gradient in gradients)
    value = torch.tensor(squares, dtype=torch.float64).sqrt()
    return Expected(value, 4 * ROUNDOFF[torch.float32] * value)
