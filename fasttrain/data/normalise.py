"""One source's rows in the one form that is tokenised, every row accounted for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Json, LargeList, List, Value

from fasttrain.config.errors import Problem, UserError
from fasttrain.config.schema.data import DataSection, SourceSection
from fasttrain.core.data_report import SourceReport
from fasttrain.core.interfaces import Examples
from fasttrain.data.arrow_file import BATCH_ROWS, ArrowFile, discard
from fasttrain.data.columns import Sample
from fasttrain.data.convert import convert_conversation, convert_text
from fasttrain.data.detect import Detected, detect
from fasttrain.data.messages import RowError
from fasttrain.data.sources import GROUP, ORIGIN, PROBLEM, RESERVED

NORMAL_COLUMNS = ("kind", "messages", "text", "source", "group", "origin")
SAMPLE_ROWS = 100
SHOWN_PROBLEMS = 10
NOT_DRAWN = "not drawn (max_samples)"


@dataclass
class LoadedSource:
    """A source as it was loaded, and which of its rows are used."""

    name: str
    key: str  # in the config
    section: SourceSection
    rows: Dataset
    note: str = ""  # what the source says about how it read them
    drawn: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))


@dataclass(frozen=True)
class NormalSource:
    """A source's drawn rows with NORMAL_COLUMNS, and what became of each of its rows."""

    rows: Dataset
    kind: str
    report: SourceReport


def normalise(source: LoadedSource, section: DataSection, examples: Examples) -> NormalSource:
    """Convert the drawn rows. UserError where no format fits, or a row is refused."""
    drawn = source.rows.select(source.drawn)
    detected = _detect(source, examples)
    supervise = "all" if section.train_on_prompts else examples.supervise
    refused = _Refused()
    with ArrowFile(pa.schema([(column, pa.string()) for column in NORMAL_COLUMNS])) as file:
        for row, origin in _rows(source, drawn, detected):
            try:
                _raise_problem(row)
                if detected.kind == "text":
                    messages, text = "", convert_text(row, detected.columns)
                else:
                    chat = convert_conversation(row, detected.columns, supervise)
                    messages, text = chat.to_json(), ""
            except RowError as error:
                refused.add(error, origin)
                continue
            group = row.get(GROUP)
            group = "" if group is None else str(group)
            file.add((detected.kind, messages, text, source.name, group, origin))
        if refused.counts and (section.invalid == "error" or refused.counts.total() == len(drawn)):
            raise refused.as_user_error(len(drawn))
        normal = file.dataset()
    discard(source.rows)
    report = _report(source, detected, len(normal), refused)
    return NormalSource(normal, detected.kind, report)


def _detect(source: LoadedSource, examples: Examples) -> Detected:
    names = source.rows.column_names
    columns = tuple(column for column in names if column not in RESERVED)
    readable = (row for row in _plain(source.rows, names) if not row.get(PROBLEM))
    sample = Sample(columns, list(islice(readable, SAMPLE_ROWS)), source.key)
    if not sample.rows:  # nothing to detect from: every row will be refused with its own reason
        return Detected("text", {}, "nothing: no row could be read")
    detected = detect(sample, source.section.columns)
    if detected.kind not in examples.kinds:
        raise UserError(
            Problem(
                f"the rows are {detected.sentence}; this method takes {', '.join(examples.kinds)}.",
                key=source.key,
            )
        )
    notes = [detected.sentence, source.note]
    notes += ["rows grouped by column group"] if GROUP in names else []
    return replace(detected, sentence="; ".join(filter(None, notes)))


def _rows(
    source: LoadedSource, drawn: Dataset, detected: Detected
) -> Iterator[tuple[dict[str, Any], str]]:
    """The drawn rows with the columns that are needed, each with its origin."""
    needed = {*detected.columns.values(), *RESERVED} & set(drawn.column_names)
    rows = _plain(drawn, [column for column in drawn.column_names if column in needed])
    for number, row in zip(source.drawn.tolist(), rows, strict=True):
        yield row, row.get(ORIGIN) or f"{source.name}: row {number + 1}"


def _plain(rows: Dataset, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Rows as Python objects, straight from Arrow: no image is decoded, no number rounded."""
    selected = rows.select_columns(columns).with_format("arrow")
    for batch in selected.iter(BATCH_ROWS):
        values = [_plain_column(batch.column(name), rows.features[name]) for name in columns]
        for row in zip(*values, strict=True):
            yield dict(zip(columns, row, strict=True))


def _plain_column(column: pa.ChunkedArray, feature: Any) -> list[Any]:
    values = column.to_pylist()
    return values if isinstance(feature, Value) else [_plain_value(v, feature) for v in values]


def _plain_value(value: Any, feature: Any) -> Any:
    """A nested value as it was before it went into Arrow.

    Arrow gives each object in a column the fields of all: those that an object did not have come
    back as nulls, and are taken out again. What is kept as JSON has no such nulls.
    """
    if value is None:
        return None
    if isinstance(feature, Json):
        return json.loads(value)
    if isinstance(feature, dict):
        parts = {key: part for key, part in value.items() if part is not None}
        return {key: _plain_value(part, feature[key]) for key, part in parts.items()}
    if isinstance(feature, List | LargeList):
        return [_plain_value(part, feature.feature) for part in value]
    return value


def _raise_problem(row: Mapping[str, Any]) -> None:
    problem = row.get(PROBLEM)
    if problem:
        raise RowError(problem["reason"], "", problem["detail"])


def _report(source: LoadedSource, detected: Detected, used: int, refused: _Refused) -> SourceReport:
    dropped = refused.summary()
    undrawn = len(source.rows) - len(source.drawn)
    if undrawn:
        dropped[NOT_DRAWN] = undrawn
    return SourceReport(source.name, detected.sentence, len(source.rows), used, dropped)


class _Refused:
    """Rows that cannot be learnt from, counted by reason, the first ones by name."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._problems: list[Problem] = []

    def add(self, error: RowError, origin: str) -> None:
        self.counts[error.reason] += 1
        self._first.setdefault(error.reason, origin)
        if len(self._problems) < SHOWN_PROBLEMS:
            what = f"{error.reason} {error.detail}".rstrip()
            self._problems.append(Problem(f"{what}.", where=origin, key=error.field))

    def summary(self) -> dict[str, int]:
        """Reason, with the first row it struck → rows."""
        return {
            f"{reason} (first: {self._first[reason]})": count
            for reason, count in self.counts.items()
        }

    def as_user_error(self, rows: int) -> UserError:
        """The first problems, and how many rows there are in all."""
        bad = self.counts.total()
        if bad == rows:
            last = f"none of the {rows} rows can be learnt from."
            return UserError(*self._problems, last)
        last = f"{bad} of {rows} rows cannot be learnt from."
        return UserError(
            *self._problems, Problem(last, hint="Mend them, or set data.invalid: drop.")
        )
