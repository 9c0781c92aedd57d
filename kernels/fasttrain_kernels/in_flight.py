"""Launches that are being tried for the first time, written down before they are made.

A kernel may end its process, and then nothing in the process can say so. Each such launch is a file
that its process holds locked; the kernel of the operating system lets go of the lock however the
process ends. A file that nobody holds is a launch that its process did not survive.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TextIO


class Crash(NamedTuple):
    """A launch that ended its process."""

    op: str
    backend: str
    what: str
    process: int


@contextmanager
def in_flight(folder: Path, op: str, backend: str, what: str) -> Iterator[None]:
    """Around a launch that may end the process. An exception leaves no trace, and neither does a
    folder that can't be written."""
    path = folder / f"{os.getpid()}-{secrets.token_hex(4)}.json"
    held = _locked(path, json.dumps(Crash(op, backend, what, os.getpid())._asdict()))
    try:
        yield
    finally:
        if held is not None:
            with suppress(OSError):  # it can't be written any more: a crash, to whoever reads it
                path.unlink(missing_ok=True)
            held.close()


def crashes(folder: Path) -> list[Crash]:
    """Launches that ended their processes; each is told once."""
    found = []
    for path in folder.glob("*.json"):
        # OSError: its process lives, or another has just told it. ValueError: half written.
        with suppress(OSError, ValueError, TypeError), open(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            found.append(Crash(**json.loads(file.read())))
    return found


def _locked(path: Path, text: str) -> TextIO | None:
    """A new file that holds `text`, locked; None where there can be none."""
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Locked before it gets the name that is looked for: unlocked, it would be a crash.
        held = open(temporary, "w")  # noqa: SIM115  (open as long as the launch takes)
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.write(text)
        held.flush()
        os.replace(temporary, path)
    except OSError:
        return None
    return held
