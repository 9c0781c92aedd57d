"""The lines of a text file, with the place of every byte that is no text."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fasttrain.config.errors import Problem, UserError
from fasttrain.data.sources.rows import RawRow, RowProblem

BOM = b"\xef\xbb\xbf"


def shown(path: Path) -> str:
    """The path as errors name it: relative to the working directory where it lies below it."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def open_bytes(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed where its name ends in .gz."""
    return path.open("rb") if path.suffix != ".gz" else gzip.open(path, "rb")  # type: ignore[return-value]


def damaged_gzip(path: Path, error: Exception) -> UserError:
    """The compressed file ends too early or was altered."""
    return UserError(
        Problem(
            f"the gzip file is truncated or damaged ({error}).",
            where=shown(path),
            hint="Fetch it again.",
        )
    )


class TextLines:
    """Iterates over the decoded lines of a file, line ends included.

    A line that is no UTF-8, or holds a NUL byte, is remembered until `take_trouble()` asks for it:
    what a row is (one line, or several) is the reader's affair.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0  # of the line read last, from 1
        self._trouble: RawRow | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            with open_bytes(self.path) as file:
                for raw in file:
                    self.number += 1
                    if self.number == 1 and raw.startswith(BOM):
                        raw = raw[len(BOM) :]
                    yield self._decode(raw)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise damaged_gzip(self.path, error) from error

    def take_trouble(self) -> RawRow | None:
        """The first undecodable line since the last call, as an unreadable row."""
        trouble, self._trouble = self._trouble, None
        return trouble

    def _decode(self, raw: bytes) -> str:
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self._note(error.start, RowProblem("invalid UTF-8", f"(byte 0x{raw[error.start]:02x})"))
            return raw.decode("utf-8", errors="replace")
        if "\x00" in text:
            self._note(raw.index(0), RowProblem("NUL byte", "in text; is the file UTF-16?"))
        return text

    def _note(self, offset: int, problem: RowProblem) -> None:
        if self._trouble is None:
            place = f"{shown(self.path)}:{self.number}:{offset + 1}"
            self._trouble = RawRow(place, None, problem)
