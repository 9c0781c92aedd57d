"""Whether the local data files are there, and what their names say: a look, not a reading."""

from __future__ import annotations

import codecs
import difflib
import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from fasttrain.config.errors import Problem
from fasttrain.config.normalise import DATA_SUFFIXES
from fasttrain.config.schema.data import FileSourceConfig
from fasttrain.config.schema.root import TrainConfig

HEAD = 1 << 16  # bytes that are looked at
MAX_FILES = 16  # of one source
_MAGIC = {b"PAR1": "Parquet", b"\x1f\x8b": "gzip", b"PK\x03\x04": "a zip archive"}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class _Source:
    """One file source and where it stands in the config."""

    key: str
    path: str
    held_out: bool

    def files(self) -> list[str]:
        """The files that are read, sorted."""
        if os.path.isdir(self.path):
            names = sorted(os.listdir(self.path))
            found = [os.path.join(self.path, name) for name in names if not name.startswith(".")]
            return [file for file in found if suffix(file) and os.path.isfile(file)]
        if os.path.exists(self.path):
            return [self.path]
        return sorted(f for f in glob.glob(self.path, recursive=True) if os.path.isfile(f))


def suffix(path: str) -> str | None:
    """The format by name, `.gz` aside; None where it is none of ours."""
    ending = os.path.splitext(path.lower().removesuffix(".gz"))[1]
    return ending if ending in DATA_SUFFIXES else None


def check_held_out(config: TrainConfig) -> Iterator[Problem]:
    """Held-out rows are split off or named, not both."""
    data = config.data
    if data.eval_sources and data.eval_split > 0:
        what = f"excludes data.eval_sources (got {data.eval_split:g})."
        yield Problem(what, key="data.eval_split", hint="Keep one.")
    if data.eval_split == 1:
        what = "leaves nothing to train on (got 1, expected a share such as 5%)."
        yield Problem(what, key="data.eval_split")


def check_sources(config: TrainConfig) -> Iterator[Problem]:
    """Every file source names files that exist, once, and look like what they are called."""
    seen: dict[str, _Source] = {}
    rows_are_checked = config.data.invalid == "error"
    for source in _file_sources(config):
        files = source.files()
        if not files:
            yield _no_files(source)
        for index, file in enumerate(files):
            identity = os.path.realpath(file)
            if identity in seen:
                yield _given_twice(source, seen[identity], file)
                continue
            seen[identity] = source
            problem = peek(file, rows=rows_are_checked) if index < MAX_FILES else None
            if problem is not None:
                yield problem


def _file_sources(config: TrainConfig) -> Iterator[_Source]:
    for name in ("sources", "eval_sources"):
        for index, section in enumerate(getattr(config.data, name)):
            if isinstance(section, FileSourceConfig):
                key = f"data.{name}[{index}].path"
                yield _Source(key, section.path, held_out=name == "eval_sources")


def _no_files(source: _Source) -> Problem:
    path = source.path
    known = ", ".join(DATA_SUFFIXES)
    if os.path.isdir(path):
        what = f"the directory holds no data file (got '{path}', expected files of {known})."
        return Problem(what, key=source.key)
    if glob.has_magic(path):
        return Problem(f"no file matches (got '{path}').", key=source.key)
    return Problem(f"no such file (got '{path}').", key=source.key, hint=similar(path))


def _given_twice(source: _Source, first: _Source, file: str) -> Problem:
    what = f"the file is named twice (got '{file}', first under {first.key})."
    hint = "Keep one."
    if source.held_out and not first.held_out:
        what = f"held-out rows would be trained on: '{file}' stands under {first.key} too."
        hint = "Use data.eval_split to hold out a part of it."
    return Problem(what, key=source.key, hint=hint)


def similar(path: str) -> str:
    """`Did you mean …?` for a path with a name that resembles what is there."""
    directory, name = os.path.split(path)
    if not os.path.isdir(directory or "."):
        return f"There is no directory '{directory}' either."
    close = difflib.get_close_matches(name, sorted(os.listdir(directory or ".")), n=1)
    return f"Did you mean '{os.path.join(directory, close[0])}'?" if close else ""


# --- a look inside -------------------------------------------------------------------------------


def peek(path: str, *, rows: bool = True) -> Problem | None:
    """What the first bytes tell is wrong; None where nothing is, or the format is unknown.

    With `rows`, the first row of a JSON Lines file is read as well.
    """
    kind = suffix(path)
    try:
        head = _head(path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        return Problem(f"the gzip file is truncated or damaged ({error}).", where=path)
    except OSError as error:
        return Problem(f"cannot be read ({error.strerror}).", where=path)
    if not head:
        return Problem("the file is empty.", where=path)
    if kind is None:
        return None
    if kind == ".parquet":
        return _peek_parquet(path, head)
    return _peek_text(path, head, kind, rows=rows)


def _head(path: str) -> bytes:
    if path.endswith(".gz"):
        with gzip.open(path) as compressed:
            return compressed.read(HEAD)
    with open(path, "rb") as file:
        return file.read(HEAD)


def _peek_parquet(path: str, head: bytes) -> Problem | None:
    if not head.startswith(b"PAR1"):
        return Problem("no Parquet file: it does not begin with PAR1.", where=path)
    if path.endswith(".gz"):
        return None
    with open(path, "rb") as file:
        file.seek(-4, os.SEEK_END)
        complete = file.read() == b"PAR1"
    what = "the Parquet file is truncated: it does not end with PAR1."
    return None if complete else Problem(what, where=path, hint="Fetch it again.")


def _peek_text(path: str, head: bytes, kind: str, *, rows: bool) -> Problem | None:
    if head.startswith(_UTF16):
        return Problem("UTF-16 text (expected UTF-8).", where=path, hint="Save it as UTF-8.")
    for magic, found in _MAGIC.items():
        if head.startswith(magic):
            what = f"the content is {found}, not {kind}."
            return Problem(what, where=path, hint="Give it its real suffix.")
    if not rows:
        return None
    problem = _undecodable(path, head.removeprefix(_BOM))
    if problem is None and kind == ".jsonl":
        problem = _peek_jsonl(path, head.removeprefix(_BOM))
    return problem


def _undecodable(path: str, head: bytes) -> Problem | None:
    """The place of the first byte that is no UTF-8; a character cut off by the end is none."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError as error:
        line = head.count(b"\n", 0, error.start) + 1
        column = error.start - (head.rfind(b"\n", 0, error.start) + 1) + 1
        what = f"invalid UTF-8 (byte 0x{head[error.start]:02x})."
        return Problem(what, where=f"{path}:{line}:{column}", hint="Save it as UTF-8.")
    return None


def _peek_jsonl(path: str, head: bytes) -> Problem | None:
    """The first row, if it ends within what was read."""
    lines = head.split(b"\n")
    if len(head) >= HEAD:
        lines.pop()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            return _row_problem(f"{path}:{number}", line.decode())
    return None


def _row_problem(where: str, text: str) -> Problem | None:
    if text.lstrip().startswith("["):
        what = "a JSON array, not one row per line."
        return Problem(what, where=where, hint="Rename the file to .json.")
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "Every row stands on one line." if text.strip() == "{" else ""
        return Problem(f"invalid JSON at column {error.colno} ({error.msg}).", where, hint=hint)
    except RecursionError:
        return Problem("invalid JSON (nested too deeply).", where)
    if not isinstance(row, dict):
        return Problem("not a JSON object (expected one row per line).", where)
    return None
