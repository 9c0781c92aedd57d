"""Right, and better not taken by itself."""

from toy_op.reference import backward, forward, unsupported

__all__ = ["advice", "backward", "forward", "unsupported"]


def advice(problem):
    return "compiles for long"
