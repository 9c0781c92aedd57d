"""Named slices in files, and whole tensors out of the files of any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fasttrain.checkpoint.tensor_file import FileSum, TensorFile, write_tensors
from fasttrain.core.engine_interface import NamedSlice

Kind = Literal["model", "optimizer"]
KINDS: tuple[Kind, ...] = ("model", "optimizer")

# The header says for every tensor where it belongs: [offset, global shape].
_PLACES = "slices"


def write_slices(path: Path, slices: Iterable[NamedSlice]) -> FileSum:
    """Write one rank's slices of one kind. A name may occur once."""
    tensors: dict[str, Tensor] = {}
    places: dict[str, tuple[int, tuple[int, ...]]] = {}
    for piece in slices:
        assert piece.name not in tensors, f"two slices of {piece.name} on one rank"
        tensors[piece.name] = piece.tensor
        places[piece.name] = (piece.offset, tuple(piece.global_shape))
    return write_tensors(path, tensors, {_PLACES: json.dumps(places)})


@dataclass(frozen=True)
class _Piece:
    """Where a part of a tensor lies: elements from `offset` on of the flattened whole."""

    file: TensorFile
    offset: int
    global_shape: tuple[int, ...]


def read_whole(paths: Sequence[Path], kind: Kind) -> Iterator[NamedSlice]:
    """Whole tensors from the files of all ranks, one at a time, on the CPU.

    ValueError where the pieces of a tensor don't cover it exactly.
    """
    pieces: dict[str, list[_Piece]] = {}
    for path in paths:
        file = TensorFile(path)
        for name, (offset, shape) in json.loads(file.metadata[_PLACES]).items():
            pieces.setdefault(name, []).append(_Piece(file, offset, tuple(shape)))
    for name, parts in pieces.items():
        whole = _assemble(name, parts)
        yield NamedSlice(
            kind=kind, name=name, tensor=whole, global_shape=tuple(whole.shape), offset=0
        )


def _assemble(name: str, parts: list[_Piece]) -> Tensor:
    shape = parts[0].global_shape
    tensors: list[Tensor] = []
    end = 0
    for part in sorted(parts, key=lambda part: part.offset):
        tensor = part.file[name].reshape(-1)
        if part.offset != end or part.global_shape != shape:
            raise ValueError(f"{name}: the slices of its ranks don't fit together")
        tensors.append(tensor)
        end += tensor.numel()
    if end != prod(shape):
        raise ValueError(f"{name}: {end} of its {prod(shape)} elements are there")
    whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return whole.reshape(shape)
