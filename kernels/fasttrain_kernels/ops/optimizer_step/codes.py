"""Moments of 8 bits: shares of a power of two that 256 elements have in common.

A code c stands for a share of its block's scale:
    second moment, of which the root is kept:  2^-16 (1 + f/16) 2^e, c = 16 e + f, never 0
    first moment, beside its sign:             2^-16 ((1 + f/8) 2^e - 1), c = 8 e + f
so that sizes from the block's largest down to 1/65536 of it have steps of 1/16 and 1/8. Values are
rounded at random, up with the probability that makes the code right on average: rounded to nearest,
a moment that changes by 0.1 % a step would never leave its code. The scale is a power of two, so
that a code stays what it is when the scale changes; a root is never rounded to 0, since it divides.

Block-wise 8-bit moments: Dettmers et al. 2021 (arXiv 2110.02861), with other codes and to nearest.
"""

import torch
from torch import Tensor

from fasttrain_kernels.ops.optimizer_step.table import BLOCK

ROOT_SHIFT, ROOT_BASE = 19, 111 * 16
SIZE_SHIFT, SIZE_BASE = 20, 111 * 8
LEAST = 1 / 65536


def _bits(value: Tensor) -> Tensor:
    return value.view(torch.int32).long()


def _value(bits: Tensor) -> Tensor:
    return bits.int().view(torch.float32)


def spread(scale: Tensor, lead: int, count: int) -> Tensor:
    """scale (blocks,) -> (count,): each element's."""
    return scale.repeat_interleave(BLOCK)[lead : lead + count]


def scale_of(values: Tensor, lead: int) -> Tensor:
    """(n,) float32, not negative -> (blocks,) scales: so large that rounding up still fits.

    0 for a block of zeros, or of less than 2^-125.
    """
    blocks = -(-(lead + values.numel()) // BLOCK)
    padded = values.new_zeros(blocks * BLOCK)
    padded[lead : lead + values.numel()] = values
    largest = padded.view(blocks, BLOCK).amax(1)
    exponent = ((_bits(largest * 1.0001) + (1 << SIZE_SHIFT)) >> 23) & 0xFF
    return torch.where(exponent < 2, 0.0, _value((exponent.clamp(max=252) + 1) << 23))


def _share(values: Tensor, scale: Tensor, lead: int) -> Tensor:
    inverse = torch.where(scale == 0, 0.0, scale.reciprocal())
    return values * spread(inverse, lead, values.numel())


def root_codes(roots: Tensor, scale: Tensor, lead: int, random: Tensor) -> Tensor:
    """(n,) float32 -> uint8; random: 16 bits, int64."""
    share = _share(roots, scale, lead).clamp(min=LEAST)
    return (((_bits(share) + (random << 3)) >> ROOT_SHIFT) - ROOT_BASE).to(torch.uint8)


def roots_of(codes: Tensor, scale: Tensor, lead: int) -> Tensor:
    """(n,) uint8 -> float32."""
    share = _value((codes.long() + ROOT_BASE) << ROOT_SHIFT)
    return share * spread(scale, lead, codes.numel())


def first_codes(values: Tensor, scale: Tensor, lead: int, random: Tensor) -> Tensor:
    """(n,) float32 -> uint8; random: 16 bits, int64."""
    size = _share(values, scale, lead).abs() + LEAST
    code = ((_bits(size) + (random << 4)) >> SIZE_SHIFT) - SIZE_BASE
    return (code | ((_bits(values) >> 24) & 0x80)).to(torch.uint8)


def firsts_of(codes: Tensor, scale: Tensor, lead: int) -> Tensor:
    """(n,) uint8 -> float32."""
    size = _value(((codes.long() & 0x7F) + SIZE_BASE) << SIZE_SHIFT) - LEAST
    signed = torch.where(codes >= 0x80, -size, size)
    return signed * spread(scale, lead, codes.numel())
