"""Parquet: Arrow already, so batches are copied and no row becomes a Python object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features
from datasets.table import table_cast

from fasttrain.config.errors import Problem, UserError
from fasttrain.data.arrow_file import BATCH_ROWS, ArrowFile
from fasttrain.data.sources import ORIGIN
from fasttrain.data.sources.text_lines import open_bytes, shown


def read_parquet(paths: list[Path]) -> Dataset:
    """The rows of files that have the same columns, in order."""
    schema = _schema(paths[0])
    with ArrowFile(schema.append(pa.field(ORIGIN, pa.string()))) as file:
        for path in paths:
            if _schema(path).names != schema.names or _schema(path).types != schema.types:
                raise UserError(
                    Problem(
                        f"other columns than in {shown(paths[0])} "
                        f"({_columns(_schema(path))} here, {_columns(schema)} there).",
                        where=shown(path),
                        hint="Give them as separate sources.",
                    )
                )
            _copy(path, schema, file)
        if file.rows == 0:
            raise UserError(Problem("holds no rows.", where=shown(paths[0])))
        return file.dataset()


def _copy(path: Path, schema: pa.Schema, file: ArrowFile) -> None:
    number = 0
    try:
        for batch in _open(path).iter_batches(batch_size=BATCH_ROWS):
            table = table_cast(pa.Table.from_batches([batch]), schema)
            rows = range(number + 1, number + batch.num_rows + 1)
            origins = pa.array([f"{shown(path)}:row {row}" for row in rows])
            for part in table.append_column(ORIGIN, origins).to_batches():
                file.write(part)
            number += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _schema(path: Path) -> pa.Schema:
    """The file's columns with the types that datasets gives them (dictionaries decoded, …)."""
    try:
        return Features.from_arrow_schema(_open(path).schema_arrow).arrow_schema
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _open(path: Path) -> pq.ParquetFile:
    if path.suffix != ".gz":
        return pq.ParquetFile(path, memory_map=True)
    with open_bytes(path) as file:
        return pq.ParquetFile(pa.BufferReader(file.read()))


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0].rstrip(".")
    return UserError(
        Problem(
            f"the Parquet file is truncated or damaged ({reason}).",
            where=shown(path),
            hint="Fetch it again.",
        )
    )


def _columns(schema: Any) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)
