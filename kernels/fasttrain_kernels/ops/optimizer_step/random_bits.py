"""Random bits by counting: 16 for each element of a step, whoever computes them.

They follow from a seed, the number of the tensor, the number of the step and that of the element in
the whole tensor: a parameter that is cut into parts, on any number of devices, is rounded alike.
The same formulas stand in csrc/common/optimizer_math.h. int64 arithmetic wraps as uint64 does.
"""

import torch
from torch import Tensor

LOWER = 0xFFFFFFFF


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
_USE = _signed(0x5851F42D4C957F2D)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """A logical shift to the right, where torch's is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _keyed(key: Tensor, counter: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    z = key + (counter + 1) * _GOLDEN
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def random_bits(seed: int, stream: int, step: Tensor, number: Tensor, use: int) -> Tensor:
    """16 bits, int64, for each element `number` (n,) int64 of a tensor; step () is from 1.

    use: 0 for the parameter, 1 for moments. Two neighbours share a hash of 32 bits.
    """
    start = torch.tensor([_signed(seed % (1 << 64)), stream], device=number.device)
    key = _keyed(_keyed(start[0], start[1]), step.long())
    key = _keyed(key, number >> 32) + use * _USE
    x = ((number >> 1) ^ key) & LOWER
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & LOWER
    x = (x + _shifted(key, 32)) & LOWER
    x = ((x ^ (x >> 15)) * 0xD35A2D97) & LOWER
    x = x ^ (x >> 15)
    return (x >> 16 * (number & 1)) & 0xFFFF
