"""What kernels need to know about the documents of a packed batch, computed once on the CPU."""

from __future__ import annotations

import copy
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
        """The same with its tiles on `device`, asynchronously from pinned memory; the offsets stay
        on the CPU."""
        return self._with_tiles(self.tiles.to(device, non_blocking=True))

    def pin_memory(self) -> DocumentLayout:
        """The same with its tiles in page-locked memory."""
        return self._with_tiles(self.tiles.pin_memory())

    def _with_tiles(self, tiles: Tensor) -> DocumentLayout:
        changed = copy.copy(self)
        object.__setattr__(changed, "tiles", tiles)
        return changed
