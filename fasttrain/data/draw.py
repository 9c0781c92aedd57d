"""Which rows are used, and which are held out: seeded, and the same in whatever order rows come."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset

from fasttrain.config.errors import Problem, UserError

if TYPE_CHECKING:
    from fasttrain.data.normalise import LoadedSource


def draw_rows(sources: list[LoadedSource], *, total: int | None, seed: int) -> None:
    """Choose rows of each source up to its max_samples, then up to `total` of all of them.

    Rows keep their order; each source's `drawn` says which they are.
    """
    chosen = []
    for source in sources:
        rows = np.arange(len(source.rows))
        chosen.append(_draw(rows, source.section.max_samples, f"{seed}:{source.key}"))
    sizes = [len(rows) for rows in chosen]
    kept = _draw(np.arange(sum(sizes)), total, f"{seed}:all")
    start = 0
    for source, rows in zip(sources, chosen, strict=True):
        mine = kept[(kept >= start) & (kept < start + len(rows))] - start
        start += len(rows)
        source.drawn = rows[mine]


def _draw(rows: np.ndarray, count: int | None, seed: str) -> np.ndarray:
    """`count` of `rows`, in their order; all of them where that is no fewer."""
    if count is None or count >= len(rows):
        return rows
    # numpy promises that RandomState's stream never changes, and promises that of no other.
    generator = np.random.RandomState(int.from_bytes(_digest(seed.encode())[:4], "big"))
    return np.sort(rows[generator.permutation(len(rows))[:count]])


def hold_out(rows: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """(training, held-out) rows. Whole groups are held out; equal rows of no group are one group.

    Groups are taken in the order of a seeded hash while that brings the held-out rows nearer to
    `share` of all. At least one group stands on either side.
    """
    keys = _group_keys(rows, seed)
    groups, sizes = np.unique(keys, return_counts=True)  # sorted: the order of the hashes
    if len(groups) < 2:
        raise UserError(
            Problem(
                f"there is nothing to hold out: the {len(rows)} rows are one group (the same value "
                f"in column 'group', or the same text).",
                key="data.eval_split",
                hint="Give eval_sources, or eval_split: 0.",
            )
        )
    chosen = _take(sizes, share * len(rows))
    held = np.isin(keys, groups[chosen])
    return rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(held))


def _take(sizes: np.ndarray, target: float) -> list[int]:
    chosen: list[int] = []
    total = 0
    for index, size in enumerate(sizes.tolist()):
        if total + size / 2 <= target and len(chosen) < len(sizes) - 1:
            chosen.append(index)
            total += size
    return chosen or [int(np.argmin(sizes))]


def _group_keys(rows: Dataset, seed: int) -> np.ndarray:
    """(rows,) uint64: one seeded hash per group."""
    keys = np.empty(len(rows), dtype=np.uint64)
    start = 0
    salt = f"{seed}:held out".encode()
    for batch in rows.select_columns(["group", "messages", "text"]).iter(1000):
        for row in zip(batch["group"], batch["messages"], batch["text"], strict=True):
            group, messages, text = row
            content = f"group {group}" if group else f"row {messages}{text}"
            keys[start] = int.from_bytes(_digest(content.encode(), salt), "big")
            start += 1
    return keys


def _digest(data: bytes, key: bytes = b"") -> bytes:
    return hashlib.blake2b(data, digest_size=8, key=key).digest()
