"""JSON Lines: one object per line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fasttrain.data.sources.rows import RawRow, RowProblem
from fasttrain.data.sources.text_lines import TextLines, shown

# Half of a surrogate pair, written as an escape, is valid JSON and no text.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_jsonl(path: Path) -> Iterator[RawRow]:
    """One row per line that is not blank. A line that cannot be read is a row with a problem."""
    lines = TextLines(path)
    name = shown(path)
    for text in lines:
        trouble = lines.take_trouble()
        if trouble is not None:
            yield trouble
        elif not text.isspace():
            yield parse_row(text.rstrip(), f"{name}:{lines.number}")


def parse_row(text: str, origin: str) -> RawRow:
    """The row that a JSON text holds."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        return RawRow(origin, None, _invalid(error, text))
    except RecursionError:
        return RawRow(origin, None, RowProblem("invalid JSON", "(nested too deeply)"))
    return checked_row(values, text, origin)


def checked_row(values: Any, text: str, origin: str) -> RawRow:
    """A row must be an object, and its strings must be text. `text` is the JSON it was."""
    if not isinstance(values, dict):
        problem = RowProblem("not a JSON object", f"but {describe(values)}")
        return RawRow(origin, None, problem)
    if _SURROGATE.search(text):
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            problem = RowProblem("invalid Unicode", f"(half a surrogate pair, \\u{code:04x})")
            return RawRow(origin, None, problem)
    return RawRow(origin, values)


def describe(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        short = value if len(value) <= 40 else value[:37] + "..."
        return f"the text {short!r}"
    return "a list" if isinstance(value, list) else "an object"


def _invalid(error: json.JSONDecodeError, text: str) -> RowProblem:
    detail = f"at column {error.colno} ({error.msg})"
    if text.strip() in ("{", "["):
        detail += "; every row must stand on one line"
    return RowProblem("invalid JSON", detail)
