"""From characters to tokens, by the offsets of one tokenisation of the whole text.

A token belongs to the span in which it ends: one that begins in the prompt and ends in the answer
is learnt, one that begins in the answer and ends in the next header is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fasttrain.data.masks import Rendering
from fasttrain.data.template import Span


@dataclass(frozen=True)
class TokenisedText:
    """A text, its n tokens, and which characters [start, stop) each of them stands for."""

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]

    @cached_property
    def ends(self) -> np.ndarray:
        """(n,) int64: the character behind each token."""
        return np.fromiter((stop for _, stop in self.offsets), np.int64, count=len(self.offsets))

    def tokens_in(self, span: Span) -> tuple[int, int]:
        """The tokens [first, last) that end within a span of characters."""
        first, last = np.searchsorted(self.ends, span, side="right").tolist()
        return first, last

    def supervised(
        self, rendering: Rendering, special_ids: frozenset[int], *, whole: bool
    ) -> np.ndarray:
        """(n,) bool: the tokens that are learnt.

        Unless the `whole` text is, a turn's tokens begin behind its header and end with its
        end-of-turn token: blanks behind that are never generated.
        """
        supervised = np.zeros(len(self.ids), np.bool_)
        for span in rendering.supervised:
            first, last = self.tokens_in(span)
            if not whole:
                first = self._behind_header(first, last, span, special_ids)
                last = self._without_blanks(first, last, special_ids)
            supervised[first:last] = True
        for span in rendering.excluded:
            first, last = self.tokens_in(span)
            supervised[first:last] = False
        return supervised

    def offsets_lie(self, places: Iterable[int], decode: Callable[[list[int]], str]) -> bool:
        """Whether what tokens decode to, up to any of `places`, is not the text up to there.

        A tokenizer that changes the text (lower case, other Unicode forms) can't be judged so.
        """
        if _squeezed(decode(self.ids)) != _squeezed(self.text):
            return False
        for place in places:
            count, _ = self.tokens_in((place, place))
            is_across = count < len(self.ids) and self.offsets[count][0] < place
            before = _squeezed(decode(self.ids[:count]))
            if not is_across and before != _squeezed(self.text[:place]):
                return True
        return False

    def offsets_fall(self) -> bool:
        """Whether a token ends before an earlier one does."""
        return bool((np.diff(self.ends) < 0).any())

    def _behind_header(self, first: int, last: int, span: Span, special_ids: frozenset[int]) -> int:
        """Some special tokens swallow all blanks behind them (AddedToken.rstrip), so that a header
        may end in the answer."""
        is_header = (
            first < last and self.ids[first] in special_ids and self.offsets[first][0] < span[0]
        )
        return first + is_header

    def _without_blanks(self, first: int, last: int, special_ids: frozenset[int]) -> int:
        end = last
        while end > first and self.ids[end - 1] not in special_ids:
            if self.text[slice(*self.offsets[end - 1])].strip():
                return last
            end -= 1
        return end if end > first else last


def _squeezed(text: str) -> str:
    """`text` without blanks, which decoders add and drop."""
    return "".join(text.split())
