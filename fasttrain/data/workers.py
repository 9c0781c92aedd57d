"""Encodes a data set's rows in several processes, in the order of the rows."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from datasets import Dataset

from fasttrain.data.encode import Chunk, Encoder

CHUNK_ROWS = 512
MAX_DEFAULT_WORKERS = 16
# Below this the processes cost more than they bring.
_ROWS_WORTH_A_PROCESS = 2 * CHUNK_ROWS

_PARALLELISM = "TOKENIZERS_PARALLELISM"


def default_workers() -> int:
    """The cores this process may use, at most MAX_DEFAULT_WORKERS.

    One where processes can't be forked safely: elsewhere than on Linux.
    """
    if sys.platform != "linux":
        return 1
    return min(len(os.sched_getaffinity(0)), MAX_DEFAULT_WORKERS)


def encode_rows(rows: Dataset, encoder: Encoder, *, workers: int) -> Iterator[Chunk]:
    """Chunks of all rows in order, whatever the number of `workers`."""
    spans = [
        (start, min(start + CHUNK_ROWS, len(rows))) for start in range(0, len(rows), CHUNK_ROWS)
    ]
    workers = min(workers, len(rows) // _ROWS_WORTH_A_PROCESS)
    if workers <= 1:
        for span in spans:
            yield _encode(encoder, rows, span)
        return
    # Forked, so that workers share the rows and a user's script needs no `if __name__` guard.
    executor = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_start_worker,
        initargs=(encoder, rows),
    )
    try:
        with _single_threaded_tokenizers():
            yield from executor.map(_encode_in_worker, spans)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _encode(encoder: Encoder, rows: Dataset, span: tuple[int, int]) -> Chunk:
    return encoder.encode(rows[span[0] : span[1]], span[0])


_worker_job: tuple[Encoder, Dataset]


def _start_worker(encoder: Encoder, rows: Dataset) -> None:
    global _worker_job
    _worker_job = encoder, rows
    # Ctrl-C reaches the whole group; the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _encode_in_worker(span: tuple[int, int]) -> Chunk:
    return _encode(*_worker_job, span)


@contextmanager
def _single_threaded_tokenizers() -> Iterator[None]:
    """tokenizers' threads do not survive a fork; workers must not wait for them."""
    before = os.environ.get(_PARALLELISM)
    os.environ[_PARALLELISM] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PARALLELISM]
        else:
            os.environ[_PARALLELISM] = before
