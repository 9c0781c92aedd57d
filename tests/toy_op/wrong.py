"""Its gradients are wrong."""

from toy_op.reference import forward, unsupported

__all__ = ["backward", "forward", "unsupported"]


def backward(dy):
    return 2.001 * dy
