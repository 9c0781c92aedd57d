"""Writes NaN from the `first`-th call on more than 7 numbers on."""

from toy_op import reference
from toy_op.reference import unsupported

__all__ = ["backward", "forward", "unsupported"]
calls, first = 0, 1


def forward(x):
    global calls
    calls += x.numel() > 7
    y = reference.forward(x)
    if calls >= first and x.numel() > 7:
        y[-1] = float("nan")
    return y


def backward(dy):
    return reference.backward(dy)
