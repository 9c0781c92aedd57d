"""Right to rounding, and says so."""

from toy_op.reference import backward, forward, unsupported

__all__ = ["backward", "forward", "unsupported", "varies"]


def varies(problem):
    return "it adds in whatever order"
