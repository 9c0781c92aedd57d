"""Whether a file is what its name says, from its first bytes."""

from __future__ import annotations

import zlib
from gzip import BadGzipFile
from pathlib import Path

from fasttrain.config.errors import Problem, UserError
from fasttrain.data.sources.text_lines import BOM, damaged_gzip, open_bytes, shown

_PARQUET = b"PAR1"
# First bytes → what the file is, and what to do about it.
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (_PARQUET, "a Parquet file", "Rename it to .parquet."),
    (b"\x1f\x8b", "gzip-compressed", "Add .gz to its name."),
    (b"PK\x03\x04", "a zip archive or a spreadsheet", "Unpack it, or save it as .csv."),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", "Decompress it."),
    (b"\xfd7zXZ", "xz-compressed", "Decompress it."),
    (b"BZh", "bzip2-compressed", "Decompress it."),
    (b"ARROW1", "an Arrow file", "Save it as .parquet."),
    (b"%PDF", "a PDF", "Extract its text."),
    (b"SQLite format 3", "an SQLite database", "Export the table as .csv or .jsonl."),
    (b"\x80\x04\x95", "a Python pickle", "Save its rows as .jsonl; pickles are never read."),
    (b"\xff\xfe", "UTF-16 text", "Convert it: iconv -f UTF-16 -t UTF-8."),
    (b"\xfe\xff", "UTF-16 text", "Convert it: iconv -f UTF-16 -t UTF-8."),
    (b"version https://git-lfs", "a Git LFS pointer, not the data", "Run git lfs pull."),
)
_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")


def refuse_other_content(path: Path, kind: str) -> None:
    """UserError where the file is empty, or plainly another format than `kind` (its suffix)."""
    try:
        with open_bytes(path) as file:
            head = file.read(4096)
    except (EOFError, zlib.error, BadGzipFile) as error:
        raise damaged_gzip(path, error) from error
    where = shown(path)
    if not head:
        raise UserError(Problem("the file is empty.", where=where))
    found = _other(head, kind)
    if found is not None:
        what, hint = found
        raise UserError(Problem(f"this is {what}, not {kind}.", where=where, hint=hint))


def _other(head: bytes, kind: str) -> tuple[str, str] | None:
    for signature, what, hint in _SIGNATURES:
        if head.startswith(signature):
            return None if (signature, kind) == (_PARQUET, ".parquet") else (what, hint)
    start = head.removeprefix(BOM).lstrip()
    if kind != ".txt" and start.lower().startswith(_MARKUP):
        return "an HTML or XML page", "A failed download? Fetch the file itself."
    if kind == ".parquet":
        return "no Parquet file", "It does not begin with PAR1."
    if kind == ".jsonl" and start.startswith(b"["):
        return "a JSON array, not one row per line", "Rename it to .json."
    if kind == ".csv" and start.startswith((b"{", b"[")):
        return "JSON", "Rename it to .jsonl or .json."
    return None
