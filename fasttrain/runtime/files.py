"""Files that are whole or absent, whatever moment the process dies at.

Data reach the disk before the name that promises them: write, fsync, rename, fsync the directory.
Nothing here follows a symbolic link that somebody planted where we write.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".tmp-"
"""Prefix of what is being written or removed; whatever carries it may be deleted."""

REPLACED = ".replaced"
"""Suffix of a directory that is just being replaced."""

log = logging.getLogger("fasttrain")


def temporary_name(target: Path) -> Path:
    """A fresh name beside `target`, for what will be renamed to it."""
    return target.with_name(f"{TEMPORARY}{target.name}-{os.getpid()}-{secrets.token_hex(4)}")


@contextmanager
def created(path: Path) -> Iterator[BinaryIO]:
    """A new file, opened for writing, on the disk when the block ends.

    FileExistsError where anything has the name already, a symbolic link included.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    # 4 MiB: large tensors pass by the buffer anyway, small ones are gathered into few writes.
    with os.fdopen(os.open(path, flags, 0o666), "wb", buffering=1 << 22) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_new(path: Path, data: bytes) -> None:
    """Write a file that must not exist yet, through to the disk."""
    with created(path) as file:
        file.write(data)


def write_atomically(path: Path, data: bytes) -> None:
    """Create or replace a file: readers, and a crash, see the old content or the new, whole."""
    temporary = temporary_name(path)
    try:
        write_new(temporary, data)
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """A file that is a file, for reading: OSError where it is a symbolic link or a device."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    with os.fdopen(os.open(path, flags), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        yield file


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_directory(directory: Path) -> None:
    """Bring a directory's entries to the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Bring a directory that another library wrote to the disk, files before their directory."""
    for root, _, names in os.walk(directory, topdown=False):
        for name in names:
            descriptor = os.open(Path(root, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(root))


def replace_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Make `target` what `write(temporary)` makes, or leave it as it was.

    rename() can't replace a directory that holds something, so the old one steps aside first, to
    `<name>.replaced`; a crash just then leaves it whole under that name.
    """
    if target.is_symlink():
        raise FileExistsError(f"{target} is a symbolic link; nothing is written through it")
    old = target.with_name(target.name + REPLACED)
    temporary = temporary_name(target)
    temporary.mkdir()
    try:
        write(temporary)
        sync_directory(temporary)
        if target.exists():
            remove_directory(old)
            os.rename(target, old)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
    sync_directory(target.parent)
    remove_directory(old)


def remove_directory(directory: Path) -> None:
    """Delete a directory, if it is there, so that no half of it is ever seen under its name.

    OSError where it can't be taken away; what then can't be deleted is told, and stays under a
    temporary name.
    """
    if directory.exists():
        doomed = temporary_name(directory)
        os.rename(directory, doomed)
        _delete(doomed)


def remove_temporaries(directory: Path) -> None:
    """Delete what writers that died left in `directory`. Its lock must be held."""
    for entry in directory.glob(f"{TEMPORARY}*"):
        _delete(entry)


def _delete(path: Path) -> None:
    """Delete a file, a link or a tree. Space that can't be had back is no reason to stop."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        log.warning("%s could not be deleted: %s", path, error)
