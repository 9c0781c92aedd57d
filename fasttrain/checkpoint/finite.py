"""Weights that are not finite must not pass for a good checkpoint."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fasttrain.core.checkpoint_interface import UnfitToSave
from fasttrain.core.engine_interface import NamedSlice


def refuse_nonfinite(slices: Iterable[NamedSlice]) -> None:
    """Raise UnfitToSave where a tensor holds NaN or infinity. Reads each once, waits once."""
    floating = [piece for piece in slices if piece.tensor.is_floating_point()]
    if not floating:
        return
    # One flag per tensor stays on the device, so that the host waits for all of them together.
    finite = torch.stack([torch.isfinite(piece.tensor).all() for piece in floating]).tolist()
    bad = [piece.name for piece, good in zip(floating, finite, strict=True) if not good]
    if bad:
        others = f" (and {len(bad) - 1} other tensors)" if len(bad) > 1 else ""
        raise UnfitToSave(f"{bad[0]}{others} holds NaN or infinity")
