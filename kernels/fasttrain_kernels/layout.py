"""What kernels need to know about the documents of a packed batch, computed once on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fasttrain_kernels.ops.packed_attention.tiles import tile_table


@dataclass(frozen=True)
class DocumentLayout:
    """The documents that lie one after the other in a flat batch.

    A kernel that is given it never waits for the device: lengths and offsets are the host's, and
    the tiles were made there once for all layers.
    """

    lengths: tuple[int, ...]
    offsets: Tensor = field(init=False, compare=False)  # (docs + 1,) int32 on the CPU: cu_seqlens
    tiles: Tensor = field(init=False, compare=False)  # ops/packed_attention/tiles.py

    def __post_init__(self) -> None:
        offsets = torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32)
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "tiles", tile_table(offsets))

    def to(self, device: torch.device) -> DocumentLayout:
        """The same with its tiles on `device`; the offsets stay on the CPU."""
        moved = object.__new__(DocumentLayout)
        object.__setattr__(moved, "lengths", self.lengths)
        object.__setattr__(moved, "offsets", self.offsets)
        object.__setattr__(moved, "tiles", self.tiles.to(device, non_blocking=True))
        return moved
