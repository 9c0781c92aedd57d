"""A step of an optimizer, the definition: plain PyTorch, a tensor at a time.

g is the gradient times sign / grad_scale, and times max_norm / norm where the norm is larger (with
norm divided by grad_scale as well, and 1e-6 added, as torch.nn.utils.clip_grad_norm_ has it); t
counts steps from 1; p is the parameter, or its master. In float32 (float64 for float64):

adamw (arXiv 1711.05101)
    m = m + (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2
    p = (1 - lr wd) p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
lion (arXiv 2302.06675)
    p = (1 - lr wd) p - lr sign(beta1 m + (1 - beta1) g);  m = beta2 m + (1 - beta2) g
sgd, as torch.optim.SGD
    g = g + wd p;  m = momentum m + (1 - dampening) g, the first time m = g
    p = p - lr m, with Nesterov's p = p - lr (g + momentum m); without moments p = p - lr g

A parameter of 16 bits is the rounded master; or, alone, is rounded at random ("stochastic", arXiv
2010.06192), or carries what its rounding lost to the next step ("kahan", there too). Moments of 16
bits are rounded at random, for to nearest a moment that changes by 0.1 % a step would stand still;
those of 8 bits are codes (codes.py). The update is made from moments before they are rounded.

Where `skip` is not 0, or the norm is not finite, everything stays as it is, gradients and the count
of steps too; that is decided on the device.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fasttrain_kernels.ops.optimizer_step import codes
from fasttrain_kernels.ops.optimizer_step.random_bits import random_bits
from fasttrain_kernels.ops.optimizer_step.step import Numbers, Slot, Step


class Problem(NamedTuple):
    """The facts that decide which backend can serve a step."""

    device: torch.device
    dtype: torch.dtype  # of parameters
    grad_dtype: torch.dtype
    algorithm: str
    rounding: str
    moments: str
    rows: int = 0  # elements of all tensors; a power of two


Keep = Callable[[Tensor | None, Tensor], None]  # stores a new value, unless the step is skipped


class Moved(NamedTuple):
    """A tensor after its step, in the dtype of computation."""

    change: Tensor  # what the parameter is lessened by, beside its decay
    decay: Tensor  # () what it is multiplied by
    first: Tensor | None
    second: Tensor | None


def unsupported(problem: Problem) -> str | None:
    """The definition serves everything."""
    return None


@torch.no_grad()
def step(work: Step) -> None:
    """Step every slot in place."""
    for slot in work.slots:
        if slot.param.numel() > 0:
            _step(slot, work)
        slot.step += torch.where(_skipped(work, slot.param.device), 0.0, 1.0)


def _skipped(work: Step, device: torch.device) -> Tensor:
    skipped = torch.zeros((), dtype=torch.bool, device=device)
    if work.skip is not None:
        skipped = skipped | (work.skip != 0)
    if work.norm is not None:
        skipped = skipped | ~torch.isfinite(work.norm)
    return skipped


def factor_of(work: Step, numbers: Numbers, wide: torch.dtype) -> Tensor:
    """() what gradients are multiplied by."""
    factor = torch.as_tensor(numbers.sign, dtype=torch.float64)
    scale = 1.0 if work.grad_scale is None else work.grad_scale.double()
    factor = factor / scale
    if work.norm is not None and work.max_norm > 0:
        norm = work.norm.double() / scale + 1e-6
        factor = factor * torch.where(norm > work.max_norm, work.max_norm / norm, 1.0)
    return factor.to(wide)


def _step(slot: Slot, work: Step) -> None:
    wide = torch.float64 if slot.param.dtype == torch.float64 else torch.float32
    numbers = Numbers(*work.numbers[slot.group])
    kept = slot.beside if work.rounding == "master" else slot.param
    assert kept is not None
    param = kept.reshape(-1).to(wide)
    grad = slot.grad.reshape(-1).to(wide) * factor_of(work, numbers, wide)
    count = slot.step.double() + 1
    moved = RULES[work.algorithm](param, grad, *moments_of(slot, work.moments), numbers, count)

    number = torch.arange(param.numel(), device=param.device) + slot.offset
    bits = [random_bits(work.seed, slot.stream, count, number, use) for use in (0, 1)]
    skipped = _skipped(work, param.device)

    def keep(old: Tensor | None, new: Tensor) -> None:
        assert old is not None
        old.copy_(torch.where(skipped, old, new.to(old.dtype).view(old.shape)))

    if work.rounding == "kahan":
        assert slot.beside is not None
        wanted = param * (moved.decay - 1) - moved.change + slot.beside.reshape(-1).to(wide)
        new = (param + wanted).to(slot.param.dtype)
        keep(slot.beside, wanted - (new.to(wide) - param))
    else:
        new = param * moved.decay - moved.change
        if work.rounding == "master":
            keep(slot.beside, new)
        if work.rounding == "stochastic":
            new = rounded_at_random(new, bits[0])
    keep(slot.param, new)
    _keep_moments(slot, moved, bits[1], keep)
    if work.zero_grad:
        keep(slot.grad, torch.zeros_like(grad))


def moments_of(slot: Slot, kind: str) -> tuple[Tensor | None, Tensor | None]:
    """Both moments (n,) in the dtype of computation, or None where there is none."""
    wide = torch.float64 if slot.param.dtype == torch.float64 else torch.float32
    first, second = (None if t is None else t.reshape(-1) for t in (slot.first, slot.second))
    if kind != "8bit":
        return (None if t is None else t.to(wide) for t in (first, second))  # type: ignore[return-value]
    if first is not None and slot.first_scale is not None:
        first = codes.firsts_of(first, slot.first_scale, slot.lead)
    if second is not None and slot.second_scale is not None:
        second = codes.roots_of(second, slot.second_scale, slot.lead).square()
    return first, second


def _keep_moments(slot: Slot, moved: Moved, bits: Tensor, keep: Keep) -> None:
    """Store both moments as the slot has them, rounded by the same 16 random bits."""
    parts = (
        (slot.first, slot.first_scale, moved.first, False),
        (slot.second, slot.second_scale, moved.second, True),
    )
    for stored, scale, value, is_root in parts:
        if stored is None or value is None:
            continue
        if scale is not None:
            value = value.sqrt() if is_root else value
            new_scale = codes.scale_of(value.abs(), slot.lead)
            encode = codes.root_codes if is_root else codes.first_codes
            keep(stored, encode(value, new_scale, slot.lead, bits))
            keep(scale, new_scale)
        elif stored.dtype == torch.bfloat16:
            keep(stored, rounded_at_random(value, bits))
        else:
            keep(stored, value)


def rounded_at_random(value: Tensor, random: Tensor) -> Tensor:
    """(n,) float32 -> bfloat16, up with the probability that makes it right on average.

    random: (n,) int64, of 16 bits.
    """
    bits = value.float().view(torch.int32).long() + random
    upper = (bits & 0xFFFF0000).int().view(torch.float32)
    return torch.where(value.isnan(), value.float(), upper).to(torch.bfloat16)


def _adamw(
    param: Tensor,
    grad: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    n: Numbers,
    count: Tensor,
) -> Moved:
    assert first is not None and second is not None
    first = first + (grad - first) * (1 - n.beta1)
    second = second * n.beta2 + grad * grad * (1 - n.beta2)
    rate = (n.lr / (1 - n.beta1**count)).to(param.dtype)
    root_factor = (1 / (1 - n.beta2**count).sqrt()).to(param.dtype)
    change = first * rate / (second.sqrt() * root_factor + n.eps)
    return Moved(change, _decay(param, n), first, second)


def _lion(
    param: Tensor,
    grad: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    n: Numbers,
    count: Tensor,
) -> Moved:
    assert first is not None
    mix = first * n.beta1 + grad * (1 - n.beta1)
    first = first * n.beta2 + grad * (1 - n.beta2)
    return Moved(mix.sign() * n.lr, _decay(param, n), first, None)


def _sgd(
    param: Tensor,
    grad: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    n: Numbers,
    count: Tensor,
) -> Moved:
    grad = grad + param * n.weight_decay
    if first is not None:
        share = torch.where(count == 1, 1.0, 1.0 - n.beta2).to(param.dtype)
        first = first * n.beta1 + grad * share
        grad = torch.where(torch.as_tensor(n.nesterov != 0), grad + first * n.beta1, first)
    return Moved(grad * n.lr, param.new_ones(()), first, None)


def _decay(param: Tensor, n: Numbers) -> Tensor:
    return torch.as_tensor(1 - n.lr * n.weight_decay, dtype=param.dtype, device=param.device)


RULES = {"adamw": _adamw, "lion": _lion, "sgd": _sgd}
