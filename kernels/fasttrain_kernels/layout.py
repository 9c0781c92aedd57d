"""What kernels need to know about the documents of a packed batch, computed once on the CPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DocumentLayout:
    """Lengths of the documents that lie one after the other in a flat batch.

    They are host integers, so that a kernel which needs them never waits for the device.
    """

    lengths: tuple[int, ...]
