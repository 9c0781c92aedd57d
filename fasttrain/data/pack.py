"""Packs: documents put together to fill max_length, anew in each epoch.

Best-fit decreasing (Johnson 1974): the longest document first, each into the pack where it leaves
the least room. The documents of an epoch are shuffled, cut into windows, packed window by window,
and the packs shuffled; all from (seed, epoch), so that any epoch can be made on its own, and on any
number of processes alike.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packs:
    """P packs of D documents in all, in the order in which they are trained on."""

    documents: np.ndarray  # (D,) int64: document numbers, pack after pack
    offsets: np.ndarray  # (P + 1,) int64: where each pack begins, and D

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """The documents of a pack."""
        return self.documents[self.offsets[index] : self.offsets[index + 1]]

    def waste(self, lengths: np.ndarray, capacity: int) -> float:
        """Share of the packs' `capacity` tokens each that is empty."""
        return 1 - int(lengths[self.documents].sum()) / (len(self) * capacity)

    def gather(self, packs: list[int]) -> np.ndarray:
        """The documents of several packs, pack after pack."""
        return np.concatenate([self[pack] for pack in packs])

    def attention_costs(self, lengths: np.ndarray, first: int, last: int) -> np.ndarray:
        """(last - first,) float64: Σ length² of packs [first, last), the work of attention."""
        offsets = self.offsets[first : last + 1]
        squares = lengths[self.documents[offsets[0] : offsets[-1]]].astype(np.float64) ** 2
        return np.add.reduceat(squares, offsets[:-1] - offsets[0])


@dataclass(frozen=True)
class Packer:
    """How documents become packs. Without a capacity each document is a pack of its own."""

    lengths: np.ndarray  # (D,) int64, none above the capacity
    capacity: int | None  # tokens of a pack
    window: int  # documents that are packed together
    seed: int

    def packs(self, epoch: int) -> Packs:
        """The packs of epoch `epoch` (0-based)."""
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
        order = generator.permutation(len(self.lengths))
        if self.capacity is None:
            return Packs(order, np.arange(len(order) + 1))
        windows = [
            best_fit_decreasing(self.lengths, order[start : start + self.window], self.capacity)
            for start in range(0, len(order), self.window)
        ]
        packs = _joined(windows)
        return _reordered(packs, generator.permutation(len(packs)))

    @property
    def count_varies(self) -> bool:
        """Whether epochs may have different numbers of packs. Over all documents at once the number
        follows from the lengths alone."""
        return self.capacity is not None and len(self.lengths) > self.window


def best_fit_decreasing(lengths: np.ndarray, documents: np.ndarray, capacity: int) -> Packs:
    """Pack `documents` (numbers into `lengths`); among equal lengths, the earlier one first.

    Nearly linear in the documents: packs wait in one list per remaining room, and the rooms that
    some pack has are kept sorted.
    """
    order = documents[np.argsort(-lengths[documents], kind="stable")]
    waiting: list[list[int]] = [[] for _ in range(capacity)]  # packs by room
    rooms: list[int] = []  # those of waiting that hold a pack, rising
    pack_of = np.empty(len(order), np.int64)
    count = 0
    for place, length in enumerate(lengths[order].tolist()):
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            pack = waiting[room].pop()
            if not waiting[room]:
                del rooms[at]
        else:
            room, pack = capacity, count
            count += 1
        pack_of[place] = pack
        room -= length
        if room:
            if not waiting[room]:
                insort(rooms, room)
            waiting[room].append(pack)
    sizes = np.bincount(pack_of, minlength=count)
    by_pack = order[np.argsort(pack_of, kind="stable")]
    return Packs(by_pack, np.concatenate([[0], np.cumsum(sizes)]))


def balanced_shares(costs: np.ndarray, ranks: int) -> list[list[int]]:
    """Divide a global batch's packs among `ranks`: equal numbers (to one), near-equal Σ costs.

    The costliest pack first, each to the rank with the least so far that has room (Graham 1969).
    `costs` (P,). Within a share packs keep their order.
    """
    if ranks == 1:
        return [list(range(len(costs)))]
    fewer, more = divmod(len(costs), ranks)
    shares: list[list[int]] = [[] for _ in range(ranks)]
    sums = [0.0] * ranks
    for pack in np.argsort(-costs, kind="stable").tolist():
        full = sum(len(share) > fewer for share in shares)
        room = fewer + (full < more)
        rank = min(
            (rank for rank in range(ranks) if len(shares[rank]) < room), key=sums.__getitem__
        )
        shares[rank].append(pack)
        sums[rank] += costs[pack]
    return [sorted(share) for share in shares]


def _joined(parts: Iterable[Packs]) -> Packs:
    parts = list(parts)
    sizes = [np.diff(part.offsets) for part in parts]
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    return Packs(np.concatenate([part.documents for part in parts]), offsets)


def _reordered(packs: Packs, order: np.ndarray) -> Packs:
    sizes = np.diff(packs.offsets)[order]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    # Each place of the result comes from its pack's old begin, as far in as it is now.
    source = np.repeat(packs.offsets[order] - offsets[:-1], sizes) + np.arange(offsets[-1])
    return Packs(packs.documents[source], offsets)
