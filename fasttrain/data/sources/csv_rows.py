"""CSV with a header: commas, and quotes as spreadsheets write them."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fasttrain.config.errors import Problem, UserError
from fasttrain.data.sources.rows import RawRow, RowProblem
from fasttrain.data.sources.text_lines import TextLines, shown

# The csv module's own limit of 131,072 characters is shorter than a long document.
FIELD_CHARACTERS = 2**31 - 1


def read_csv(path: Path) -> Iterator[RawRow]:
    """One row per record; all values are text. One of another width is a row with a problem."""
    csv.field_size_limit(FIELD_CHARACTERS)
    lines = TextLines(path)
    name = shown(path)
    records = csv.reader(iter(lines), strict=True)
    header: list[str] | None = None
    try:
        while True:
            first_line = lines.number + 1
            fields = next(records, None)
            if fields is None:
                return
            trouble = lines.take_trouble()
            if not fields:
                continue
            if header is None:
                header = _header(fields, trouble, f"{name}:{first_line}")
            else:
                yield trouble or _row(fields, header, f"{name}:{first_line}")
    except csv.Error as error:
        raise UserError(
            Problem(
                f"a broken CSV record ({error}).",
                where=f"{name}:{first_line}",
                hint="Is a quote missing?",
            )
        ) from error


def _header(fields: list[str], trouble: RawRow | None, where: str) -> list[str]:
    if trouble is not None and trouble.problem is not None:
        raise UserError(Problem(" ".join(trouble.problem), where=trouble.origin))
    fields = [field.strip() for field in fields]
    repeated = [field for field, count in Counter(fields).items() if count > 1]
    if repeated:
        raise UserError(Problem(f"the header names '{repeated[0]}' twice.", where=where))
    if len(fields) == 1 and any(separator in fields[0] for separator in ";\t|"):
        raise UserError(
            Problem(
                f"the header has no comma ({fields[0][:60]!r}).",
                where=where,
                hint="Save the file with commas between the columns.",
            )
        )
    return fields


def _row(fields: list[str], header: list[str], origin: str) -> RawRow:
    if len(fields) != len(header):
        detail = f"({len(fields)}; the header has {len(header)})"
        return RawRow(origin, None, RowProblem("wrong number of fields", detail))
    return RawRow(origin, dict(zip(header, fields, strict=True)))
