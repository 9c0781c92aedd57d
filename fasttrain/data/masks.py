"""Which characters of a rendered conversation are learnt: the template says so.

No text is searched for, since an answer may also stand in a prompt.
A turn's span is what the model has to write once its turn has come: the text between the prompt
that the template makes of the messages before, and the rendering of the messages up to this one.
Both must be prefixes of the whole rendering. Where they are not (a template that drops earlier
thoughts, moves the system message, or merges turns), the turn is rendered once more with a
stand-in for its content: whatever differs between the two renderings is the turn's. Where the
template marks the assistant's text itself (`{% generation %}`), its marks stand. A turn that none
of these can tell from the rest is refused.

The end-of-turn token belongs to the turn. A header that the template writes before an answer does
not, prompted for or not.
"""

from __future__ import annotations

from dataclasses import dataclass

from fasttrain.data.conversation import Message
from fasttrain.data.template import (
    ChatTemplate,
    Span,
    TemplateMessage,
    TemplateRefusalError,
    template_message,
)


class UnclearTurnError(ValueError):
    """No sound way to tell a turn's text from the rest of the rendering."""


@dataclass(frozen=True)
class Rendering:
    """A conversation as text, and what of it is learnt.

    `excluded` spans are taken out of `supervised` ones. `is_open` says that the last message is
    learnt and nothing in the text ends it, so that the end-of-text token has to be appended.
    """

    text: str
    supervised: tuple[Span, ...]
    excluded: tuple[Span, ...]
    is_open: bool


def render(
    template: ChatTemplate, messages: tuple[Message, ...], *, supervise_all: bool = False
) -> Rendering:
    """The text of a conversation and the spans that are learnt.

    Assistant turns are learnt, or with `supervise_all` everything; a message's own `train` goes
    before either. TemplateRefusalError where the template does not take the conversation,
    UnclearTurnError where a span can't be told for sure.
    """
    turns = _Turns(template, [template_message(message) for message in messages])
    text = turns.text
    is_open = _is_learnt(messages[-1], supervise_all) and not _ends_with_special(template, text)
    whole = [(0, len(text))] if supervise_all else turns.marked()
    if whole is None:
        learnt = [i for i, message in enumerate(messages) if _is_learnt(message)]
        return Rendering(text, tuple(turns.span(i) for i in learnt), (), is_open)
    if is_open and not text[whole[-1][1] :].strip():
        # The blanks between the answer and the appended end are written by the model too.
        whole[-1] = (whole[-1][0], len(text))
    added = [i for i, m in enumerate(messages) if m.train and m.role != "assistant"]
    excluded = [i for i, m in enumerate(messages) if m.train is False]
    return Rendering(
        text,
        (*whole, *(turns.span(i) for i in added)),
        tuple(turns.span(i) for i in excluded),
        is_open,
    )


def _is_learnt(message: Message, supervise_all: bool = False) -> bool:
    return (
        (supervise_all or message.role == "assistant") if message.train is None else message.train
    )


def _ends_with_special(template: ChatTemplate, text: str) -> bool:
    return text.rstrip().endswith(template.special_tokens)


class _Turns:
    """Finds turns in one conversation's rendering."""

    def __init__(self, template: ChatTemplate, messages: list[TemplateMessage]) -> None:
        self.template = template
        self.messages = messages
        self.text = template.render(messages)

    def marked(self) -> list[Span] | None:
        """The template's own marks, each with the special token that follows it directly."""
        spans = self.template.marked_spans(self.messages, self.text)
        if not spans:
            return None
        return [(start, self._past_end_of_turn(start, stop)) for start, stop in spans]

    def span(self, index: int) -> Span:
        """The characters of one turn, its end-of-turn token included. Or UnclearTurnError."""
        prompt_end, turn_end = self._end_of_prompt(index), self._end_of_turn(index)
        if self.template.has_prompt and prompt_end is not None and turn_end is not None:
            span = prompt_end, turn_end
            if prompt_end < turn_end and self._shows(index, span):
                return span
        content_start, content_stop = self._content(index)
        start, stop = self._start(prompt_end, content_start), turn_end
        if stop is None or stop < content_stop:
            stop = self._stop(index, content_stop)
        if start > content_stop or not self._shows(index, (start, stop), calls_only=True):
            raise self._unclear(index)
        return start, stop

    # By prefix.

    def _end_of_prompt(self, index: int) -> int | None:
        """Where the prompt for this turn ends, if the prompt is how the whole text begins."""
        if self.messages[index]["role"] != "assistant":
            return None
        return self._length_of_prefix(self.messages[:index], prompt=True)

    def _end_of_turn(self, index: int) -> int | None:
        """Where the messages up to this one end, if they are how the whole text begins."""
        if index == len(self.messages) - 1:
            return len(self.text)
        return self._length_of_prefix(self.messages[: index + 1], prompt=False)

    def _length_of_prefix(self, messages: list[TemplateMessage], *, prompt: bool) -> int | None:
        try:
            prefix = self.template.render(messages, prompt=prompt)
        except TemplateRefusalError:  # a beginning alone may break the template's rules
            return None
        return len(prefix) if self.text.startswith(prefix) else None

    def _shows(self, index: int, span: Span, *, calls_only: bool = False) -> bool:
        """Whether all that the turn says stands in the span, word for word."""
        message, shown = self.messages[index], self.text[slice(*span)]
        said = [call["function"]["name"] for call in message.get("tool_calls", ())]
        if not calls_only:
            said.append(message.get("content") or message.get("reasoning_content") or "")
        return all(part.strip() in shown for part in said)

    # By difference.

    def _content(self, index: int) -> Span:
        """Where the rendering differs from one with a stand-in for all that the turn says."""
        stand_in = self._stand_in()
        other = self._render_with(index, stand_in, self.messages[index + 1 :])
        start = other.find(stand_in)
        rest = other[start + len(stand_in) :]
        stop = len(self.text) - len(rest)
        same = self.text[:start] == other[:start] and self.text.endswith(rest)
        # A stand-in that stands nowhere, or twice, or an answer of which nothing is left.
        if other.count(stand_in) != 1 or not same or stop < start:
            raise self._unclear(index)
        if stop == start and self._says_something(index):
            raise self._unclear(index)
        return start, stop

    def _start(self, prompt_end: int | None, content_start: int) -> int:
        """The prompt's end; but a header that comes after it belongs to nobody."""
        if prompt_end is None:
            return content_start
        header = self.text[prompt_end:content_start]
        return prompt_end if self.template.has_prompt or not header.strip() else content_start

    def _stop(self, index: int, content_stop: int) -> int:
        """Past the end-of-turn token, if the template ends this turn with one."""
        stand_in = self._stand_in()
        _, _, end = self._render_with(index, stand_in, []).partition(stand_in)
        if not self.template.end_of_turn.match(end):
            return content_stop
        return self._past_end_of_turn(content_stop, content_stop)

    def _past_end_of_turn(self, start: int, stop: int) -> int:
        if _ends_with_special(self.template, self.text[start:stop]):
            return stop
        end = self.template.end_of_turn.match(self.text, stop)
        return end.end() if end else stop

    def _render_with(self, index: int, content: str, after: list[TemplateMessage]) -> str:
        """The rendering with nothing but `content` said in this turn, and then `after`."""
        dropped = ("tool_calls", "reasoning_content")
        bare = {k: v for k, v in self.messages[index].items() if k not in dropped}
        try:
            return self.template.render(
                [*self.messages[:index], {**bare, "content": content}, *after]
            )
        except TemplateRefusalError as error:
            raise self._unclear(index) from error

    def _stand_in(self) -> str:
        """A word that is nowhere in the text."""
        word = "standin"
        while word in self.text:
            word += "x"
        return word

    def _says_something(self, index: int) -> bool:
        message = self.messages[index]
        said = (message.get(key) for key in ("content", "reasoning_content", "tool_calls"))
        return any(part.strip() if isinstance(part, str) else part for part in said)

    def _unclear(self, index: int) -> UnclearTurnError:
        role = self.messages[index]["role"]
        return UnclearTurnError(
            f"message {index + 1} ({role}) cannot be told from the rest in what the chat template "
            f"renders."
        )
