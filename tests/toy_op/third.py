"""Raises at the third call of each pass on more than 7 numbers, of which its self-test has none."""

from toy_op import reference
from toy_op.reference import unsupported

__all__ = ["backward", "forward", "unsupported"]
calls = {"forward": 0, "backward": 0}


def forward(x):
    return _counted("forward", x)


def backward(dy):
    return _counted("backward", dy)


def _counted(phase, x):
    calls[phase] += x.numel() > 7
    if calls[phase] == 3:
        raise RuntimeError(f"third {phase}\nand more lines")
    return getattr(reference, phase)(x)
