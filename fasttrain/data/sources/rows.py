"""A row as a reader found it, and how rows become a dataset without being held in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import Dataset

from fasttrain.config.errors import Problem, UserError
from fasttrain.data.arrow_file import BATCH_ROWS, ArrowFile
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


_KINDS: dict[type, str] = {
    str: "str",
    bool: "bool",
    int: "int",
    float: "float",
    type(None): "null",
}
_to_json = json.JSONEncoder(ensure_ascii=False).encode


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
            kinds[name] = _joined(kinds.get(name, "null"), value)
    return kinds


def _joined(kind: str, value: Any) -> str:
    """The narrowest kind that holds what `kind` holds, and `value`."""
    found = _KINDS.get(type(value), "json")
    if found == "int" and not -(2**63) <= value < 2**63:
        found = "json"
    if found in ("null", kind):
        return kind
    if kind == "null":
        return found
    return "float" if {kind, found} == {"int", "float"} else "json"


def _write(rows: Iterable[RawRow], kinds: dict[str, str]) -> Dataset:
    for name in (ORIGIN, PROBLEM):
        if name in kinds:
            raise UserError(
                Problem(f"column '{name}': fasttrain uses this name itself.", hint="Rename it.")
            )
    fields = [(name, _TYPES[kind]) for name, kind in kinds.items()]
    schema = pa.schema([*fields, (ORIGIN, pa.string()), (PROBLEM, PROBLEM_TYPE)])
    with ArrowFile(schema) as file:
        for row in rows:
            problem = row.problem and row.problem._asdict()
            file.add([*_cells(row.values or {}, kinds), row.origin, problem])
        return file.dataset()


def _cells(values: dict[str, Any], kinds: dict[str, str]) -> list[Any]:
    """A row's values as the columns hold them."""
    if not values.keys() <= kinds.keys():
        raise _MisfitError
    cells: list[Any] = []
    for name, kind in kinds.items():
        value = values.get(name)
        if value is None:
            cells.append(None)
            continue
        if _joined(kind, value) != kind:
            raise _MisfitError
        # An integer among floats may be wider than a float's 53 bits.
        cells.append(
            _to_json(value) if kind == "json" else float(value) if kind == "float" else value
        )
    return cells
