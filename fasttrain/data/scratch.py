"""One directory per process for rows, under TMPDIR.

It goes when the process ends; where the process was killed, the next one that needs such a
directory removes it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

from fasttrain.runtime.lock import LockHeldError, exclusive_lock

PREFIX = "fasttrain-rows-"
_LOCK = "lock"

_directory: Path | None = None
_lock = ExitStack()  # held as long as the process lives: it says that the directory is in use


def scratch_directory() -> Path:
    """This process's directory, made at the first call. Forked children share their parent's."""
    global _directory
    if _directory is None:
        _remove_abandoned()
        # Under its final name it is always locked, so that nobody takes it for abandoned.
        new = Path(tempfile.mkdtemp(prefix=f"new-{PREFIX}"))
        _lock.enter_context(exclusive_lock(new / _LOCK))
        _directory = new.rename(new.with_name(new.name.removeprefix("new-")))
        atexit.register(_remove, _directory, os.getpid())
    return _directory


def _remove(directory: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(directory, ignore_errors=True)


def _remove_abandoned() -> None:
    for directory in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            # Others' directories, and names that are no directories of ours, are left alone.
            if directory.lstat().st_uid != os.getuid() or not (directory / _LOCK).is_file():
                continue
            with exclusive_lock(directory / _LOCK):
                shutil.rmtree(directory)
        except (LockHeldError, OSError):
            continue  # in use, or another process is removing it just now
