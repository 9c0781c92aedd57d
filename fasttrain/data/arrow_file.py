"""Rows written to a temporary Arrow file and mapped, so that large data need no memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
from datasets import Dataset

from fasttrain.config.errors import Problem, UserError
from fasttrain.data.scratch import scratch_directory

# A record batch ends at whichever comes first: Arrow's string columns hold 2 GiB in one batch, and
# readers decode a batch at a time.
BATCH_ROWS = 1000
BATCH_CHARACTERS = 16 * 2**20

_written = 0


class ArrowFile:
    """Collects rows, or record batches, of one schema; `dataset()` closes the file and maps it.

    The dataset's fingerprint is a digest of what was written: the same in every process.
    """

    def __init__(self, schema: pa.Schema) -> None:
        global _written
        _written += 1
        self.schema = schema
        self.path = scratch_directory() / f"{_written:06d}.arrow"
        self.rows = 0  # written so far
        self._pending: list[Sequence[Any]] = []
        self._characters = 0
        self._digest = hashlib.blake2b(str(schema).encode(), digest_size=16)
        self._sink = pa.OSFile(str(self.path), "wb")
        self._writer = pa.ipc.new_stream(self._sink, schema)

    def __enter__(self) -> ArrowFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._close()
            return
        with suppress(OSError):  # the first error is the one to tell
            self._close()
        self.path.unlink(missing_ok=True)

    def add(self, row: Sequence[Any]) -> None:
        """Append one row, its values in the schema's order."""
        self._pending.append(row)
        self._characters += sum(len(value) for value in row if type(value) is str)
        if len(self._pending) == BATCH_ROWS or self._characters >= BATCH_CHARACTERS:
            self._flush()

    def write(self, batch: pa.RecordBatch) -> None:
        """Append a batch of this file's schema. UserError where the disk refuses it."""
        try:
            self._writer.write_batch(batch)
        except OSError as error:
            raise self._refused(error) from error
        self.rows += batch.num_rows
        for column in batch.columns:
            for buffer in column.buffers():
                if buffer is not None:
                    self._digest.update(buffer)

    def dataset(self) -> Dataset:
        """Close the file and map it."""
        self._flush()
        try:
            self._close()
        except OSError as error:
            raise self._refused(error) from error
        mapped = Dataset.from_file(str(self.path))
        mapped._fingerprint = self._digest.hexdigest()
        return mapped

    def _flush(self) -> None:
        if self._pending:
            arrays = [
                pa.array(values, type=field.type)
                for values, field in zip(zip(*self._pending, strict=True), self.schema, strict=True)
            ]
            self._pending, self._characters = [], 0
            self.write(pa.record_batch(arrays, schema=self.schema))

    def _refused(self, error: OSError) -> UserError:
        reason = os.strerror(error.errno) if error.errno else str(error)
        return UserError(
            Problem(
                f"the rows cannot be written here ({reason}).",
                where=str(self.path.parent),
                hint="Set TMPDIR to a disk with more room.",
            )
        )

    def _close(self) -> None:
        if not self._sink.closed:
            self._writer.close()
            self._sink.close()


def discard(dataset: Dataset) -> None:
    """Delete our temporary files behind a dataset that is no longer needed."""
    own = scratch_directory()
    for file in dataset.cache_files:
        path = Path(file["filename"])
        if path.parent == own:
            path.unlink(missing_ok=True)
