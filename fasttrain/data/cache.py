"""Tokenised rows, kept between runs.

An entry is a directory named by the hash of all its inputs: flat arrays as raw files, and
`meta.json` with their checksums. It is written under a temporary name and renamed when it
is whole, so that two runs, or one that is killed, never leave half an entry.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain.config.errors import Problem, UserError
from fasttrain.data import fingerprint
from fasttrain.data.documents import Documents
from fasttrain.data.encode import Chunk
from fasttrain.data.tally import Tally
from fasttrain.runtime import files

VARIABLE = "FASTTRAIN_CACHE"
SHOWN_PROBLEMS = 10
_META = "meta.json"
_ARRAYS: dict[str, Any] = {
    "tokens": np.int32,
    "supervised": np.bool_,
    "offsets": np.int64,
    "rows": np.int64,
    "source_ids": np.int32,
}
# All that reading a damaged file may raise.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError)


@dataclass(frozen=True)
class Tokenized:
    """A data set's documents, what became of its rows, and whether the work was done before."""

    documents: Documents
    tally: Tally
    message: str  # "hit: …" or "miss: …"
    fingerprint: str  # of the documents themselves


def cache_directory(setting: str | None) -> Path:
    """`data.cache_dir`, else $FASTTRAIN_CACHE, else ~/.cache/fasttrain; its `tokens` folder."""
    chosen = setting or os.environ.get(VARIABLE) or "~/.cache/fasttrain"
    return Path(chosen).expanduser() / "tokens"


def tokenized(
    directory: Path, inputs: Mapping[str, str], encode: Callable[[], Iterator[Chunk]]
) -> Tokenized:
    """The entry of these `inputs`, made by `encode` where it is not there or is damaged.

    UserError where the directory can't be written, or rows can't be used.
    """
    entry = directory / fingerprint.of_text(json.dumps(dict(inputs), sort_keys=True))[:32]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(entry):
            damage = _damage(entry)
            if damage is None:
                return _open(entry, f"hit: {entry}")
            message = f"miss: {damage or _difference(directory, inputs)}; kept in {entry}"
            files.replace_directory(entry, lambda folder: _write(folder, inputs, encode()))
            return _open(entry, message)
    except OSError as error:
        what = f"tokenised data cannot be kept in {directory}: {error}."
        hint = f"Set it, or ${VARIABLE}, to a directory with room that you may write."
        raise UserError(Problem(what, key="data.cache_dir", hint=hint)) from error


@contextmanager
def _locked(entry: Path) -> Iterator[None]:
    """One process at a time makes an entry; the others wait and then find it.

    The lock dies with its process; what that was writing is removed here.
    """
    lock = os.open(entry.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in entry.parent.glob(f"{files.TEMPORARY}{entry.name}*"):
            shutil.rmtree(leftover)
        yield
    finally:
        os.close(lock)


# --------------------------------------------------------------------------------------- reading


def _damage(entry: Path) -> str | None:
    """None where the entry is whole, "" where there is none, else what is wrong with it."""
    if not entry.exists():
        return ""
    try:
        checksums = _read_meta(entry)["checksums"]
        for name in _ARRAYS:
            if files.sha256_of(entry / f"{name}.bin") != checksums[name]:
                return f"the entry is damaged ({name}.bin does not match its checksum)"
    except _UNREADABLE as error:
        return f"the entry is damaged ({type(error).__name__}: {error})"
    return None


def _read_meta(entry: Path) -> Any:
    """What `meta.json` says. One of _UNREADABLE where it isn't what was written."""
    checksum, text = json.loads((entry / _META).read_bytes())
    if fingerprint.of_text(text) != checksum:
        raise ValueError(f"{_META} does not match its checksum")
    return json.loads(text)


def _open(entry: Path, message: str) -> Tokenized:
    meta = _read_meta(entry)
    arrays = {name: _map(entry / f"{name}.bin", dtype) for name, dtype in _ARRAYS.items()}
    documents = Documents(**arrays, source_names=tuple(meta["sources"]))
    checksums = json.dumps(meta["checksums"], sort_keys=True)
    content = fingerprint.of_text(checksums)[:32]
    return Tokenized(documents, Tally.from_json(meta["tally"]), message, content)


def _map(path: Path, dtype: Any) -> np.ndarray:
    if path.stat().st_size == 0:  # nothing can't be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r").view(np.ndarray)


def _difference(directory: Path, inputs: Mapping[str, str]) -> str:
    """Which inputs differ from those of the most similar entry."""
    changes = []
    for path in directory.glob(f"*/{_META}"):
        try:
            other = _read_meta(path.parent)["inputs"]
        except _UNREADABLE:  # a damaged entry says nothing
            continue
        changes.append([name for name in inputs if other.get(name) != inputs[name]])
    closest = min(changes, key=len, default=list(inputs))
    if len(closest) > len(inputs) // 2:
        return "nothing like it was tokenised before"
    return f"changed since before: {', '.join(closest)}"


# --------------------------------------------------------------------------------------- writing


def _write(folder: Path, inputs: Mapping[str, str], chunks: Iterable[Chunk]) -> None:
    """Write an entry's files, `meta.json` last. UserError where chunks carry problems."""
    lengths: list[int] = [0]
    rows: list[int] = []
    sources: list[int] = []
    names: dict[str, int] = {}
    tally, problems = Tally(), []
    with (
        files.created(folder / "tokens.bin") as tokens,
        files.created(folder / "supervised.bin") as supervised,
    ):
        for chunk in chunks:
            for array in chunk.tokens:
                tokens.write(array.tobytes())
            for array in chunk.supervised:
                supervised.write(array.tobytes())
            lengths += map(len, chunk.tokens)
            rows += chunk.rows
            sources += [names.setdefault(name, len(names)) for name in chunk.sources]
            tally.add(chunk.tally)
            problems += chunk.problems
            if len(problems) >= SHOWN_PROBLEMS:
                break
    if problems:
        raise UserError(*problems[:SHOWN_PROBLEMS])
    for name, values in (
        ("offsets", np.cumsum(lengths)),
        ("rows", rows),
        ("source_ids", sources),
    ):
        files.write_new(folder / f"{name}.bin", np.array(values, _ARRAYS[name]).tobytes())
    meta = {
        "inputs": dict(inputs),
        "checksums": {name: files.sha256_of(folder / f"{name}.bin") for name in _ARRAYS},
        "sources": list(names),
        "tally": tally.as_json(),
    }
    text = json.dumps(meta)
    files.write_new(folder / _META, json.dumps([fingerprint.of_text(text), text]).encode())
