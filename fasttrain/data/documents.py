"""Tokenised documents, one after the other in flat arrays that may lie in files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

# Tokens looked at together where all of a corpus is read: 16 MiB of ids.
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Documents:
    """D documents of N tokens in all. A document's first token is never supervised."""

    tokens: np.ndarray  # (N,) int32
    supervised: np.ndarray  # (N,) bool: the token is a target
    offsets: np.ndarray  # (D + 1,) int64: where each document begins, and N
    rows: np.ndarray  # (D,) int64: which row it was made of
    source_ids: np.ndarray  # (D,) int32, into source_names
    source_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """A document's tokens and which of them are supervised, both (n,)."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[span], self.supervised[span]

    def source(self, index: int) -> str:
        """The name of a document's source."""
        return self.source_names[self.source_ids[index]]

    @cached_property
    def lengths(self) -> np.ndarray:
        """(D,) int64 tokens of each document."""
        return np.diff(self.offsets)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @cached_property
    def num_supervised(self) -> int:
        """Targets of one pass."""
        return sum(int(supervised.sum()) for _, supervised in self._blocks())

    def target_counts(self, vocab_size: int) -> np.ndarray:
        """(vocab_size,) int64: how often each id is a target in one pass. ids must be below it."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for tokens, supervised in self._blocks():
            counts += np.bincount(tokens[supervised], minlength=vocab_size)
        return counts

    def _blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(self.tokens), _BLOCK):
            span = slice(start, start + _BLOCK)
            yield self.tokens[span], self.supervised[span]
