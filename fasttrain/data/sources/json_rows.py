"""JSON: a list of rows, an object that holds one, or (as many files named .json are) JSON Lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fasttrain.config.errors import Problem, UserError
from fasttrain.data.messages import looks_like_messages
from fasttrain.data.sources.jsonl import checked_row, read_jsonl
from fasttrain.data.sources.rows import RawRow
from fasttrain.data.sources.text_lines import TextLines, shown

_DECODER = json.JSONDecoder()


def read_json(path: Path) -> Iterator[RawRow]:
    """The rows, decoded one at a time; the file's text is held in memory."""
    text = _text(path)
    place = _Place(text, shown(path))
    start = _skip(text, 0)
    if text.startswith("[", start):
        yield from _array(text, start, place)
        return
    first, end = _decode(text, start, place)
    if _skip(text, end) < len(text):
        yield from read_jsonl(path)
        return
    key = _rows_key(first, place)
    if key is None:
        yield checked_row(first, text, place.at(start))
        return
    for index, row in enumerate(first[key]):
        yield checked_row(row, text, f"{place.name}:{key}[{index}]")


class _Place:
    """Line and column of an offset; offsets must rise."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self._text = text
        self._line = 1
        self._offset = 0

    def at(self, offset: int) -> str:
        self._line += self._text.count("\n", self._offset, offset)
        self._offset = offset
        return f"{self.name}:{self._line}"


def _array(text: str, start: int, place: _Place) -> Iterator[RawRow]:
    offset = _skip(text, start + 1)
    if text.startswith("]", offset):
        return
    while True:
        row, end = _decode(text, offset, place)
        yield checked_row(row, text[offset:end], place.at(offset))
        offset = _skip(text, end)
        if text.startswith("]", offset):
            break
        if not text.startswith(",", offset):
            found = f"found {text[offset]!r}" if offset < len(text) else "the file ends"
            raise UserError(
                Problem(f"expected ',' or ']' after a row, {found}.", where=place.at(offset))
            )
        offset = _skip(text, offset + 1)
    if _skip(text, offset + 1) < len(text):
        raise UserError(Problem("more follows after the array of rows.", where=place.at(offset)))


def _decode(text: str, offset: int, place: _Place) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, offset)
    except json.JSONDecodeError as error:
        where = f"{place.name}:{error.lineno}"
        what = f"invalid JSON at column {error.colno} ({error.msg})."
        raise UserError(Problem(what, where=where)) from error
    except RecursionError as error:
        raise UserError(
            Problem("invalid JSON (nested too deeply).", where=place.at(offset))
        ) from error


def _skip(text: str, offset: int) -> int:
    """The offset of the next character that is no JSON white space."""
    while offset < len(text) and text[offset] in " \t\n\r":
        offset += 1
    return offset


def _rows_key(value: Any, place: _Place) -> str | None:
    """The key of an object that holds its rows; None where the object is a row itself."""
    if not isinstance(value, dict):
        return None
    lists = [
        key
        for key, rows in value.items()
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
    ]
    if not lists or any(looks_like_messages(value[key]) for key in lists):
        return None
    if len(lists) > 1:
        raise UserError(
            Problem(
                f"several lists of rows ({', '.join(lists)}).",
                where=place.name,
                hint="Keep one of them in a file of its own.",
            )
        )
    return lists[0]


def _text(path: Path) -> str:
    lines = TextLines(path)
    parts = []
    for line in lines:
        trouble = lines.take_trouble()
        if trouble is not None and trouble.problem is not None:
            raise UserError(Problem(" ".join(trouble.problem) + ".", where=trouble.origin))
        parts.append(line)
    return "".join(parts)
