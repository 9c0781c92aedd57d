"""A tokenizer's chat template, as a function from messages to text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from fasttrain.data.conversation import Message

Span = tuple[int, int]
"""Characters [start, stop) of a text."""

TemplateMessage = dict[str, Any]
"""A message as templates read it: `role`, `content`, `reasoning_content`, `tool_calls`, …"""

# Private-use characters that stand where the template opens and closes assistant text.
OPEN, CLOSE = "\ue0f0", "\ue0f1"
_GENERATION = re.compile(r"\{%([-+]?)\s*generation\s*([-+]?)%\}")
_END_GENERATION = re.compile(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}")


_QUESTION: TemplateMessage = {"role": "user", "content": "askedbynobody"}
_ANSWER: TemplateMessage = {"role": "assistant", "content": "saidbynobody"}


class TemplateRefusalError(ValueError):
    """The template does not take this conversation, and says why."""


class ChatTemplate:
    """Renders messages as text. Rendering is transformers' own, in its sandbox."""

    def __init__(self, tokenizer: Any) -> None:
        """ValueError where the tokenizer has no chat template."""
        self._tokenizer = tokenizer
        self.text: str = tokenizer.get_chat_template()
        self.special_tokens = _special_tokens(tokenizer)

    def render(
        self, messages: list[TemplateMessage], *, prompt: bool = False, template: str | None = None
    ) -> str:
        """The text of a conversation; with `prompt`, up to where the assistant's next turn begins.

        TemplateRefusalError where the template raises, or can't cope with what it is given.
        """
        if not messages:
            raise TemplateRefusalError("there is no message.")
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt, chat_template=template
            )
        # Templates raise TemplateError on purpose, the others by operating on what isn't there.
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise TemplateRefusalError(" ".join(str(error).split())) from error
        return text

    def ends_with_special(self, text: str) -> bool:
        """Whether a special token is the last thing in `text`, blanks aside."""
        return text.rstrip().endswith(self.special_tokens)

    @cached_property
    def has_prompt(self) -> bool:
        """Whether the template opens the assistant's turn with a header when it is asked to."""
        closed, opened = self._probe(_QUESTION), self._probe(_QUESTION, prompt=True)
        return closed is not None and closed != opened

    @cached_property
    def ends_with_header(self) -> bool:
        """Whether the template opens an assistant's turn unasked, behind whatever was said last."""
        last, earlier = self._after_answers
        ended = last.rstrip().removesuffix(self._tokenizer.eos_token or "")
        return not earlier.startswith(ended)

    @cached_property
    def end_token(self) -> re.Pattern[str]:
        """Matches a token that ends an answer and the eos behind it, with the blanks around them.

        Which those are is seen from what follows a last and an earlier answer. What follows the
        latter alone may be the header of the next turn.
        """
        last, earlier = map(_any_of(self.special_tokens).match, self._after_answers)
        ends = [match.group().strip() for match in (last, earlier) if match] if last else []
        return _any_of(ends, then=self._tokenizer.eos_token)

    @cached_property
    def _after_answers(self) -> tuple[str, str]:
        """What the template writes behind an answer that is the last, and behind an earlier one.

        Empty where it does not take a conversation as plain as these.
        """
        last, earlier = self._probe(_QUESTION, _ANSWER), self._probe(_QUESTION, _ANSWER, _QUESTION)
        said = _ANSWER["content"]
        return (last or "").partition(said)[2], (earlier or "").partition(said)[2]

    def _probe(self, *messages: TemplateMessage, prompt: bool = False) -> str | None:
        try:
            return self.render(list(messages), prompt=prompt)
        except TemplateRefusalError:
            return None

    @cached_property
    def _with_marks(self) -> str | None:
        """The template with characters printed just inside its `{% generation %}` blocks.

        `print` is a block tag too, so that blanks around it are trimmed as around the marker.
        """
        if not _GENERATION.search(self.text):
            return None
        opened = _GENERATION.sub(rf"{{%\1 generation %}}{{% print '{OPEN}' \2%}}", self.text)
        return _END_GENERATION.sub(
            rf"{{%\1 print '{CLOSE}' %}}{{% endgeneration \2%}}",
            opened,
        )

    def marked_spans(self, messages: list[TemplateMessage], text: str) -> list[Span] | None:
        """What the template itself marks as the assistant's in `text`, its rendering of `messages`.

        None where it marks nothing, or where the marks can't be told.
        """
        if self._with_marks is None or OPEN in text or CLOSE in text:
            return None
        pieces = re.split(f"([{OPEN}{CLOSE}])", self.render(messages, template=self._with_marks))
        marks, texts = pieces[1::2], pieces[0::2]
        if "".join(texts) != text or "".join(marks) != (OPEN + CLOSE) * (len(marks) // 2):
            return None
        ends = [0]
        for piece in texts:
            ends.append(ends[-1] + len(piece))
        return list(zip(ends[1:-1:2], ends[2:-1:2], strict=True))


def template_message(message: Message) -> TemplateMessage:
    """A message under the names that chat templates use; what isn't set is left out."""
    values = message.as_dict()
    values.pop("train", None)
    if "reasoning" in values:
        values["reasoning_content"] = values.pop("reasoning")
    return {key: value for key, value in values.items() if value is not None}


def _special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Texts of all tokens that control the model. Many are flagged so without having a role.

    The one for unknown text, though special too, stands for text.
    """
    flagged = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted((flagged | set(tokenizer.all_special_tokens)) - {tokenizer.unk_token}))


def _any_of(tokens: Iterable[str], *, then: str | None = None) -> re.Pattern[str]:
    """One of `tokens` with the blanks around it, and `then` if it is next; never of no tokens."""
    alternatives = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
    if not alternatives:
        return re.compile(r"(?!)")
    follows = rf"(?:{re.escape(then)}\s*)?" if then else ""
    return re.compile(rf"\s*(?:{alternatives})\s*{follows}")
