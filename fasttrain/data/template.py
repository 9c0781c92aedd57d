"""A tokenizer's chat template, as a function from messages to text."""

from __future__ import annotations

import re
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


class TemplateRefusalError(ValueError):
    """The template does not take this conversation, and says why."""


class ChatTemplate:
    """Renders messages as text. Rendering is transformers' own, in its sandbox."""

    def __init__(self, tokenizer: Any) -> None:
        """ValueError where the tokenizer has no chat template."""
        self._tokenizer = tokenizer
        self.text: str = tokenizer.get_chat_template()
        self.special_tokens = _special_tokens(tokenizer)
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        alternatives = "|".join(map(re.escape, longest_first))
        # A special token right at a place, blanks before and after it allowed.
        self.end_of_turn = re.compile(rf"\s*(?:{alternatives})\s*")

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

    @cached_property
    def has_prompt(self) -> bool:
        """Whether the template opens the assistant's turn with a header when it is asked to."""
        question = [{"role": "user", "content": "?"}]
        try:
            return self.render(question, prompt=True) != self.render(question)
        except TemplateRefusalError:
            return False

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
    """Texts of all tokens that control the model. Many are flagged so without having a role."""
    flagged = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(flagged | set(tokenizer.all_special_tokens)))
