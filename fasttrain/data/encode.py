"""Rows → tokens and which of them are supervised, a chunk of rows at a time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from fasttrain.config.errors import Problem
from fasttrain.data.conversation import Conversation
from fasttrain.data.masks import Rendering, UnclearTurnError, render
from fasttrain.data.tally import Tally
from fasttrain.data.template import ChatTemplate, TemplateRefusalError
from fasttrain.data.token_spans import TokenisedText

TOO_LONG = "longer than max_length"
NOTHING_TO_LEARN = "nothing to learn"
NOTHING_LEFT = "nothing left to learn within max_length"
REFUSED = "refused by the chat template"
UNCLEAR = "a turn that cannot be told from the rest"


@dataclass(frozen=True)
class EncodeOptions:
    """What decides how a row becomes tokens, besides the tokenizer and its template."""

    max_length: int
    overlong: Literal["split", "truncate", "drop", "error"]
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

    def add(self, row: int, source: str, tokens: np.ndarray, supervised: np.ndarray) -> None:
        """Keep one document: tokens (n,) and which of them are supervised (n,)."""
        self.tokens.append(tokens)
        self.supervised.append(supervised)
        self.rows.append(row)
        self.sources.append(source)


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
            text = TokenisedText(document.text, ids, offsets)
            if self._disagreement(document, text, sample=number == 0):
                chunk.problems.append(_lying_offsets(document.origin))
            supervised = text.supervised(
                document.rendering, self._special_ids, whole=self.options.supervise_all
            )
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

    def _disagreement(self, document: _Document, text: TokenisedText, *, sample: bool) -> bool:
        """Whether offsets contradict the tokens, which would put the mask in the wrong place.

        A `sample` is decoded too.
        """
        assert document.rendering is not None
        places = itertools.chain.from_iterable(document.rendering.supervised)
        return text.offsets_fall() or (sample and text.offsets_lie(places, self._decode))

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
                hint = "Raise it, or set data.overlong to split, truncate or drop."
                chunk.problems.append(Problem(what, where=origin, hint=hint))
                return
            if self.options.overlong == "drop":
                chunk.tally.drop(source, TOO_LONG, origin)
                return
            if self.options.overlong == "split" and document.rendering is None:
                self._keep_pieces(chunk, document, tokens, supervised)
                return
            tokens, supervised = tokens[:limit], supervised[:limit]
        supervised[:1] = False
        if not supervised.any():
            chunk.tally.drop(source, NOTHING_LEFT if length > limit else NOTHING_TO_LEARN, origin)
            return
        if length > limit:
            chunk.tally.truncated[source] += 1
        chunk.add(document.row, source, tokens, supervised)

    def _keep_pieces(
        self, chunk: Chunk, document: _Document, tokens: np.ndarray, supervised: np.ndarray
    ) -> None:
        """A long plain text as several documents. A last piece of one token teaches nothing."""
        chunk.tally.split[document.source] += 1
        for start in range(0, len(tokens) - 1, self.options.max_length):
            piece = slice(start, start + self.options.max_length)
            supervised[start] = False
            chunk.add(document.row, document.source, tokens[piece], supervised[piece])


def _lying_offsets(origin: str) -> Problem:
    what = "the tokenizer's offsets do not agree with its tokens, so that nothing tells which "
    what += "tokens are an answer's."
    hint = "Use its tokenizer.json of another release, or another tokenizer."
    return Problem(what, where=origin, key="tokenizer", hint=hint)
