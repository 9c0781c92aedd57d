"""What a complete checkpoint consists of: the last file written, and the first one read.

`manifest.json` names the run, the step, and every other file with its size and SHA-256; its field
`sha256` sums the others. A directory that differs from its manifest in any bit, or has a file more
or less, is no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fasttrain.checkpoint.tensor_file import FileSum
from fasttrain.runtime.files import opened, sha256_of, write_new

FILE_NAME = "manifest.json"
FORMAT = 1
_MAX_BYTES = 64 << 20  # a line of 150 bytes for each of 400 000 files


class IncompleteError(Exception):
    """Why a directory is no complete checkpoint: one line naming the file."""


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json."""

    run_id: str
    step: int
    world_size: int
    files: Mapping[str, FileSum]  # by path below the checkpoint, with forward slashes
    format: int = FORMAT


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json, through to the disk. Everything it names must be there already."""
    write_new(directory / FILE_NAME, _text(asdict(manifest)).encode())


def read_manifest(directory: Path) -> Manifest:
    """Read manifest.json and check it against itself; IncompleteError says what is wrong."""
    try:
        with opened(directory / FILE_NAME) as file:
            text = file.read(_MAX_BYTES).decode()
        fields = json.loads(text)
        del fields["sha256"]
        intact = text == _text(fields)
    except FileNotFoundError:
        raise IncompleteError(f"{FILE_NAME} is missing") from None
    except OSError as error:
        raise IncompleteError(f"{FILE_NAME} can't be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise IncompleteError(f"{FILE_NAME} is damaged")
    if fields.get("format") != FORMAT:
        raise IncompleteError(
            f"{FILE_NAME} has format {fields.get('format')}, this version reads {FORMAT}"
        )
    files = {name: FileSum(**file_sum) for name, file_sum in fields.pop("files").items()}
    return Manifest(files=files, **fields)


def verify(directory: Path) -> Manifest:
    """Compare every file with the manifest, sizes first; IncompleteError says what differs."""
    manifest = read_manifest(directory)
    expected = set(manifest.files) | {FILE_NAME}
    present = _files_below(directory)
    for name in sorted(expected - present):
        raise IncompleteError(f"{name} is missing")
    for name in sorted(present - expected):
        raise IncompleteError(f"{name} is not in the manifest")
    for name, file_sum in manifest.files.items():
        size = (directory / name).lstat().st_size
        if size != file_sum.size:
            raise IncompleteError(f"{name} has {size} bytes, the manifest says {file_sum.size}")
    for name, file_sum in manifest.files.items():
        try:
            damaged = sha256_of(directory / name) != file_sum.sha256
        except OSError as error:
            raise IncompleteError(f"{name} can't be read ({error.strerror})") from None
        if damaged:
            raise IncompleteError(f"{name} is damaged: its SHA-256 is not the manifest's")
    return manifest


def _files_below(directory: Path) -> set[str]:
    """Everything below `directory` that is no directory; a link to one counts as a file."""
    found = set()
    for root, directories, files in os.walk(directory):
        links = [name for name in directories if Path(root, name).is_symlink()]
        found |= {Path(root, name).relative_to(directory).as_posix() for name in files + links}
    return found


def _text(fields: dict[str, Any]) -> str:
    body = json.dumps(fields, indent=1, sort_keys=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({**fields, "sha256": digest}, indent=1, sort_keys=True) + "\n"
