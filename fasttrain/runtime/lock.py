"""One process at a time."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

log = logging.getLogger("fasttrain")


class LockHeldError(Exception):
    """Another process holds the lock; the text says which, as `process 123 on host`."""


# Locks of this process. A forked child inherits the descriptor and with it the lock; were it to
# outlive its killed parent, nobody could go on with the run. So children let go of theirs.
_held: set[int] = set()


def _let_go() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; the kernel lets go of it when the process ends, however it ends.

    LockHeldError where another process, or another holder in this one, has it; OSError where the
    file can't be written. A file system that knows no locks is told about, and none is held.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    _held.add(descriptor)
    try:
        _take(descriptor, path)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _take(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            raise LockHeldError(holder or "another process") from None
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("%s: no lock (%s); a second run here goes unseen", path, error.strerror)
