"""Named tensors in a safetensors file, written one at a time.

The format (https://huggingface.co/docs/safetensors): 8 bytes, the header's length, little endian;
the header, JSON, padded with spaces; the tensors' bytes, one after the other. We write it ourselves
because the library's writer wants every tensor in host memory at once, replaces what has the name
already, and doesn't sum what it writes. Reading is the library's.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from fasttrain.runtime.files import created

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8  # bytes; the header is padded to it, so that 8-byte tensors come first and aligned


@dataclass(frozen=True)
class FileSum:
    """What a file must be: bytes and hexadecimal SHA-256."""

    size: int
    sha256: str


class SummedFile:
    """A file for writing that sums what passes through."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._size += len(data)

    @property
    def sum(self) -> FileSum:
        return FileSum(size=self._size, sha256=self._sha256.hexdigest())


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> FileSum:
    """Write a new safetensors file through to the disk and say what it is.

    Tensors may lie on any device; one at a time is copied to the host. TypeError for a dtype that
    the format doesn't have; FileExistsError and other OSErrors as the disk gives them.
    """
    # Wide elements first keep every tensor aligned to its own element.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPE_NAMES:
            raise TypeError(f"{name}: a checkpoint can't hold {tensor.dtype}")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with created(path) as file:
        summed = SummedFile(file)
        summed.write(struct.pack("<Q", len(text)))
        summed.write(text)
        for name in names:
            summed.write(_bytes_of(tensors[name]))
    return summed.sum


def _bytes_of(tensor: Tensor) -> memoryview:
    host = tensor.detach().to("cpu").contiguous()
    # A 0-dim tensor has no last dimension to reinterpret; an empty one has no bytes to show.
    return host.reshape(-1).view(torch.uint8).numpy().data


class TensorFile:
    """A safetensors file, opened for reading; tensors come to the CPU when asked for."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt", device="cpu")
        self.names: list[str] = list(self._file.keys())
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor
