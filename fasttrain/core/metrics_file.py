"""metrics.jsonl after an interruption: each step stands once."""

from __future__ import annotations

import json
import os
from pathlib import Path

from fasttrain.runtime.files import write_atomically

FILE_NAME = "metrics.jsonl"


def cut_metrics(path: Path, step: int) -> None:
    """Keep the lines up to `step`, which a resumed run goes on from; 0 keeps those before training.

    Later lines, and what a dying process left half-written, are appended to `<name>.discarded`.
    """
    if not path.exists():
        return
    kept: list[bytes] = []
    discarded: list[bytes] = []
    for line in path.read_bytes().splitlines(keepends=True):
        (kept if _step_of(line) <= step else discarded).append(line)
    if not discarded:
        return
    with open(path.with_name(path.name + ".discarded"), "ab") as file:
        file.writelines(line if line.endswith(b"\n") else line + b"\n" for line in discarded)
        file.flush()
        os.fsync(file.fileno())
    write_atomically(path, b"".join(kept))


def _step_of(line: bytes) -> float:
    """The step of a whole line; infinity for anything else, which is thereby late."""
    if not line.endswith(b"\n"):
        return float("inf")
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
