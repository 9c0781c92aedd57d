"""Every op by name, and what a backend of one is."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fasttrain_kernels.dispatch import Op

OPS: dict[str, Op] = {}


def find(op_name: str) -> Op:
    """The op called `op_name`. Raises ValueError listing the ops there are."""
    if op_name not in OPS:
        raise ValueError(f"there is no op {op_name!r}; the ops are {', '.join(sorted(OPS))}")
    return OPS[op_name]


@dataclass(frozen=True)
class Candidate:
    """A backend of an op: the module that implements it, and the device types it is made for."""

    name: str
    module: str
    devices: tuple[str, ...]  # empty: any
    provider: bool = False  # whether it is somebody else's code, which may round as models do
    isolated: bool = False  # whether its first self-test on a machine has a process of its own

    def made_for(self, device_type: str) -> bool:
        return not self.devices or device_type in self.devices

    def load(self) -> ModuleType | str:
        """The module, or the reason why it can't be imported. Asked once per process."""
        return _load(self.module)


@functools.cache
def _load(module: str) -> ModuleType | str:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        return f"cannot be imported: {error}"
