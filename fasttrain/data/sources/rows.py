"""A row as a reader found it, and how rows become a dataset without being held in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import Dataset

from fasttrain.config.errors import Problem, UserError
from fasttrain.data.arrow_file import BATCH_CHARACTERS, BATCH_ROWS, ArrowFile
from fasttrain.data.sources import ORIGIN, PROBLEM

PROBLEM_TYPE = pa.struct([("reason", pa.string()), ("detail", pa.string())])


class RowProblem(NamedTuple):
    """Why a row could not be read: a reason to count by, and the rest of the sentence."""

    reason: str
    detail: str = ""


class RawRow(NamedTuple):
    """One row: its values, or what is wrong with it."""

    origin: str
    values: dict[str, Any] | None
    problem: RowProblem | None = None


# What a column's values have in common. Lists, objects and mixtures are kept as JSON, so that no
# two rows have to agree on the fields inside: Arrow would fill those that a row lacks with nulls.
_TYPES = {
    "null": pa.string(),
    "bool": pa.bool_(),
    "int": pa.int64(),
    "float": pa.float64(),
    "str": pa.string(),
    "json": pa.json_(),
}


class _MisfitError(Exception):
    """A row does not fit the columns found so far."""


def write_rows(read: Callable[[], Iterable[RawRow]]) -> Dataset:
    """The rows that `read()` yields.

    It is called again where later rows need wider columns than the first ones: once to look at all
    of them, once to write.
    """
    columns = _kinds_of(islice(read(), BATCH_ROWS))
    try:
        return _write(read(), columns)
    except _MisfitError:
        return _write(read(), _kinds_of(read()))


def _kinds_of(rows: Iterable[RawRow]) -> dict[str, str]:
    kinds: dict[str, str] = {}
    for row in rows:
        for name, value in (row.values or {}).items():
            kinds[name] = _join(kinds.get(name, "null"), value)
    return kinds


def _join(kind: str, value: Any) -> str:
    found = _kind(value)
    if found in ("null", kind):
        return kind
    if kind == "null":
        return found
    return "float" if {kind, found} == {"int", "float"} else "json"


def _kind(value: Any) -> str:
    kind = {str: "str", bool: "bool", float: "float", type(None): "null"}.get(type(value))
    if kind is None and type(value) is int:
        return "int" if -(2**63) <= value < 2**63 else "json"
    return kind or "json"


def _write(rows: Iterable[RawRow], kinds: dict[str, str]) -> Dataset:
    for name in (ORIGIN, PROBLEM):
        if name in kinds:
            raise UserError(
                Problem(f"column '{name}': fasttrain uses this name itself.", hint="Rename it.")
            )
    fields = [(name, _TYPES[kind]) for name, kind in kinds.items()]
    schema = pa.schema([*fields, (ORIGIN, pa.string()), (PROBLEM, PROBLEM_TYPE)])
    with ArrowFile(schema) as file:
        for batch in _batches(rows):
            _refuse_misfits(batch, kinds)
            columns: list[list[Any]] = [
                _column([row.values.get(name) if row.values else None for row in batch], kind)
                for name, kind in kinds.items()
            ]
            columns.append([row.origin for row in batch])
            columns.append([row.problem and row.problem._asdict() for row in batch])
            file.write_columns(columns)
        return file.dataset()


def _refuse_misfits(batch: list[RawRow], kinds: dict[str, str]) -> None:
    for row in batch:
        for name, value in (row.values or {}).items():
            kind = kinds.get(name)
            if kind is None or _join(kind, value) != kind:
                raise _MisfitError


def _column(values: list[Any], kind: str) -> list[Any]:
    if kind == "json":
        return [None if v is None else json.dumps(v, ensure_ascii=False) for v in values]
    if kind == "float":  # integers among them may be wider than a float's 53 bits
        return [None if v is None else float(v) for v in values]
    return values


def _batches(rows: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    batch: list[RawRow] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += _size(row.values)
        if len(batch) == BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _size(value: Any) -> int:
    """Characters of text in a value, roughly."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_size(part) for part in value.values())
    if isinstance(value, list):
        return sum(_size(part) for part in value)
    return 8
