"""Ends its process, in its self-test or at its first launch on a real size."""

import os
import signal

from toy_op.reference import backward, unsupported

__all__ = ["backward", "forward", "unsupported"]


def forward(x):
    if x.numel() > 7 or os.environ.get("TOY_KILLS") == "self-test":
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * x
