"""Rows → tokens and which of them are supervised, a chunk of rows at a time.

A conversation is rendered, and its whole text tokenised once; characters are mapped to tokens by
the tokenizer's offsets. A token belongs to the span in which it ends: one that begins in the prompt
and ends in the answer is learnt, one that begins in the answer and ends in the next header is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from fasttrain.config.errors import Problem
from fasttrain.data.conversation import Conversation
from fasttrain.data.masks import Rendering, UnclearTurnError, render
from fasttrain.data.tally import Tally
from fasttrain.data.template import ChatTemplate, TemplateRefusalError

TOO_LONG = "longer than max_length"
NOTHING_TO_LEARN = "nothing to learn"
NOTHING_LEFT = "nothing left to learn within max_length"
REFUSED = "refused by the chat template"
UNCLEAR = "a turn that cannot be told from the rest"


@dataclass(frozen=True)
class EncodeOptions:
    """What decides how a row becomes tokens, besides the tokenizer and its template."""

    max_length: int
    overlong: Literal["truncate", "drop", "error"]
    invalid: Literal["error", "drop"]
    supervise_all: bool


@dataclass
class Chunk:
    """The documents made of some rows, and what became of the other rows."""

    tokens: list[np.ndarray] = field(default_factory=list)  # (n,) int32 each
    supervised: list[np.ndarray] = field(default_factory=list)  # (n,) bool each
    rows: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True)
class _Document:
    """What one row says, on its way to tokens."""

    row: int
    source: str
    origin: str
    text: str
    rendering: Rendering | None  # None for plain text


class Encoder:
    """Encodes rows with one tokenizer and one set of options."""

    def __init__(
        self, tokenizer: Any, template: ChatTemplate | None, options: EncodeOptions
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.options = options
        self._end = tokenizer.eos_token_id
        special = template.special_tokens if template is not None else ()
        self._special_ids = frozenset(tokenizer.convert_tokens_to_ids(list(special)))

    def encode(self, rows: Mapping[str, Sequence[str]], first_row: int) -> Chunk:
        """Encode columns of rows; `first_row` is the number of their first."""
        chunk = Chunk()
        documents = [
            document
            for number in range(len(rows["kind"]))
            if (document := self._read(chunk, rows, number, first_row + number)) is not None
        ]
        chats = [document for document in documents if document.rendering is not None]
        texts = [document for document in documents if document.rendering is None]
        encoded = {**self._encode_chats(chunk, chats), **self._encode_texts(texts)}
        for document in documents:
            self._keep(chunk, document, *encoded[document.row])
        return chunk

    # From rows to text.

    def _read(
        self, chunk: Chunk, rows: Mapping[str, Sequence[str]], number: int, row: int
    ) -> _Document | None:
        source, origin = rows["source"][number], rows["origin"][number]
        if rows["kind"][number] == "text":
            return _Document(row, source, origin, rows["text"][number], None)
        assert self.template is not None, "conversations need a chat template"
        messages = Conversation.from_json(rows["messages"][number]).messages
        try:
            rendering = render(self.template, messages, supervise_all=self.options.supervise_all)
        except TemplateRefusalError as error:
            what = f"the tokenizer's chat template refuses this conversation: {error}"
            self._refuse(chunk, source, origin, REFUSED, Problem(what, where=origin))
            return None
        except UnclearTurnError as error:
            problem = Problem(
                str(error),
                where=origin,
                key="tokenizer.chat_template",
                hint="Put {% generation %} and {% endgeneration %} around the assistant's text.",
            )
            self._refuse(chunk, source, origin, UNCLEAR, problem)
            return None
        return _Document(row, source, origin, rendering.text, rendering)

    def _refuse(
        self, chunk: Chunk, source: str, origin: str, reason: str, problem: Problem
    ) -> None:
        """A row that can't be used is an error or is dropped, as data.invalid says."""
        if self.options.invalid == "error":
            chunk.problems.append(problem)
        else:
            chunk.tally.drop(source, reason, origin)

    # From text to tokens.

    def _encode_texts(self, documents: list[_Document]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Plain text: every token is learnt, and the end of the text."""
        if not documents:
            return {}
        texts = [document.text for document in documents]
        encoded = self._tokenize(texts, add_special_tokens=True)
        result = {}
        for document, ids in zip(documents, encoded["input_ids"], strict=True):
            if not ids or ids[-1] != self._end:
                ids.append(self._end)
            result[document.row] = np.array(ids, np.int32), np.ones(len(ids), np.bool_)
        return result

    def _encode_chats(
        self, chunk: Chunk, documents: list[_Document]
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Conversations: what is special stands in the template; the tokenizer adds nothing."""
        if not documents:
            return {}
        texts = [document.text for document in documents]
        encoded = self._tokenize(texts, add_special_tokens=False, return_offsets_mapping=True)
        result = {}
        for number, document in enumerate(documents):
            assert document.rendering is not None
            ids, offsets = encoded["input_ids"][number], encoded["offset_mapping"][number]
            supervised = self._supervised(document.rendering, ids, offsets)
            if number == 0:
                chunk.problems += self._disagreements(document, ids, offsets)
            if document.rendering.is_open:
                ids, supervised = [*ids, self._end], np.append(supervised, True)
            result[document.row] = np.array(ids, np.int32), supervised
        return result

    def _tokenize(self, texts: list[str], **options: bool) -> Any:
        return self.tokenizer(
            texts,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **options,
        )

    def _supervised(
        self, rendering: Rendering, ids: list[int], offsets: list[tuple[int, int]]
    ) -> np.ndarray:
        """(n,) bool from spans of characters, by the rule at the top of this file."""
        supervised = np.zeros(len(ids), np.bool_)
        ends = _ends(offsets)
        for start, stop in rendering.supervised:
            first, last = np.searchsorted(ends, (start, stop), side="right").tolist()
            if not self.options.supervise_all:
                if first < last and self._is_header(ids[first], offsets[first], start):
                    first += 1
                last = self._without_blanks(rendering.text, ids, offsets, (first, last))
            supervised[first:last] = True
        for start, stop in rendering.excluded:
            first, last = np.searchsorted(ends, (start, stop), side="right").tolist()
            supervised[first:last] = False
        return supervised

    def _is_header(self, token: int, offset: tuple[int, int], start: int) -> bool:
        """Whether a token is the header before an answer, with the answer's first blanks.

        Some special tokens swallow all blanks behind them (AddedToken.rstrip).
        """
        return token in self._special_ids and offset[0] < start

    def _without_blanks(
        self,
        text: str,
        ids: list[int],
        offsets: list[tuple[int, int]],
        span: tuple[int, int],
    ) -> int:
        """Where a turn's tokens end: blanks after its end-of-turn token are never generated."""
        first, last = span
        end = last
        while end > first and ids[end - 1] not in self._special_ids:
            if text[slice(*offsets[end - 1])].strip():
                return last
            end -= 1
        return end if end > first else last

    def _disagreements(
        self, document: _Document, ids: list[int], offsets: list[tuple[int, int]]
    ) -> list[Problem]:
        """Decode what stands before the ends of each span, and compare it with the text.

        Offsets that lie would put the mask in the wrong place. One document of a chunk is looked
        at; a tokenizer that changes the text (lower case, other Unicode forms) can't be judged so.
        """
        assert document.rendering is not None
        if _squeezed(self._decode(ids)) != _squeezed(document.text):
            return []
        ends = _ends(offsets)
        for span in document.rendering.supervised:
            for place in span:
                count = int(np.searchsorted(ends, place, side="right"))
                across = count < len(ids) and offsets[count][0] < place
                before = _squeezed(self._decode(ids[:count]))
                if not across and before != _squeezed(document.text[:place]):
                    what = "the tokenizer's offsets do not agree with its tokens, so that "
                    what += "nothing tells which tokens are an answer's."
                    hint = "Use its tokenizer.json of another release, or another tokenizer."
                    return [Problem(what, where=document.origin, key="tokenizer", hint=hint)]
        return []

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    # Documents that are kept.

    def _keep(
        self, chunk: Chunk, document: _Document, tokens: np.ndarray, supervised: np.ndarray
    ) -> None:
        """Cut, drop or keep a document."""
        source, origin, limit = document.source, document.origin, self.options.max_length
        length = len(tokens)
        if length > limit:
            if self.options.overlong == "error":
                what = f"{length} tokens are more than data.max_length ({limit})."
                hint = "Raise it, or set data.overlong to truncate or drop."
                chunk.problems.append(Problem(what, where=origin, hint=hint))
                return
            if self.options.overlong == "drop":
                chunk.tally.drop(source, TOO_LONG, origin)
                return
            tokens, supervised = tokens[:limit], supervised[:limit]
        supervised[:1] = False
        if not supervised.any():
            chunk.tally.drop(source, NOTHING_LEFT if length > limit else NOTHING_TO_LEARN, origin)
            return
        if length > limit:
            chunk.tally.truncated[source] += 1
        chunk.tokens.append(tokens)
        chunk.supervised.append(supervised)
        chunk.rows.append(document.row)
        chunk.sources.append(source)


def _ends(offsets: list[tuple[int, int]]) -> np.ndarray:
    """(n,) where each token ends; never falling, so that it can be searched."""
    ends = np.fromiter((stop for _, stop in offsets), np.int64, count=len(offsets))
    return np.maximum.accumulate(ends)


def _squeezed(text: str) -> str:
    """`text` without blanks, which decoders add and drop."""
    return "".join(text.split())
