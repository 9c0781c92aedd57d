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

import itertools
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
    is_open = _is_learnt(messages[-1], supervise_all) and not template.ends_with_special(text)
    marked = None if supervise_all else turns.marked()
    if marked is None and not supervise_all:
        learnt = [i for i, message in enumerate(messages) if _is_learnt(message)]
        return Rendering(text, tuple(turns.span(i) for i in learnt), (), is_open)
    excluded = tuple(turns.span(i) for i, m in enumerate(messages) if m.train is False)
    if marked is None:
        return Rendering(text, ((0, len(text)),), excluded, is_open)
    if is_open and not text[marked[-1][1] :].strip():
        # The blanks between the answer and the appended end are written by the model too.
        marked[-1] = (marked[-1][0], len(text))
    kept = [span for span in marked if not any(_overlap(span, other) for other in excluded)]
    added = [i for i, m in enumerate(messages) if m.train and m.role != "assistant"]
    return Rendering(text, (*kept, *(turns.span(i) for i in added)), (), is_open)


def _overlap(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _is_learnt(message: Message, supervise_all: bool = False) -> bool:
    return (
        (supervise_all or message.role == "assistant") if message.train is None else message.train
    )


class _Turns:
    """Finds turns in one conversation's rendering."""

    def __init__(self, template: ChatTemplate, messages: list[TemplateMessage]) -> None:
        self.template = template
        self.messages = messages
        self.text = template.render(messages)

    def marked(self) -> list[Span] | None:
        """What the template itself marks as the assistant's, ends of turns included.

        None where it marks nothing. UnclearTurnError where it leaves out what a turn says.
        """
        spans = self.template.marked_spans(self.messages, self.text)
        if not spans:
            return None
        for index, message in enumerate(self.messages):
            if message["role"] == "assistant" and not any(self._shows(index, s) for s in spans):
                self._refuse_if_left_out(index)
        return [(start, self._past_end_token(start, stop)) for start, stop in spans]

    def span(self, index: int) -> Span:
        """The characters of one turn, its end-of-turn token included. Or UnclearTurnError."""
        start, stop = self._end_of_prompt(index), self._end_of_turn(index)
        if start is not None and stop is not None and start < stop:
            span = start, stop
            if self._shows(index, span):
                return span
        content_start, content_stop = self._content(index)
        start = content_start if start is None else start
        if stop is None or stop < content_stop:
            stop = self._past_end_token(content_stop, content_stop)
            self._refuse_if_reached_from_after(index, stop)
        calls = self.messages[index].get("tool_calls")
        if start > content_stop or (calls and not self._shows(index, (start, stop))):
            raise self._unclear(index)
        return start, stop

    # By prefix.

    def _end_of_prompt(self, index: int) -> int | None:
        """Where the prompt for this turn ends, if the prompt is how the whole text begins.

        None also where a header follows, as in templates that never write one ahead of a turn.
        """
        if self.messages[index]["role"] != "assistant":
            return None
        end = self._length_of_prefix(self.messages[:index], prompt=True)
        if end is None or self.template.has_prompt or self._opens_without_header(index, end):
            return end
        return None

    def _end_of_turn(self, index: int) -> int | None:
        """Where the messages up to this one end, if they are how the whole text begins."""
        if index < len(self.messages) - 1:
            return self._length_of_prefix(self.messages[: index + 1], prompt=False)
        return None if self.template.ends_with_header else len(self.text)

    def _length_of_prefix(self, messages: list[TemplateMessage], *, prompt: bool) -> int | None:
        prefix = self._try_render(messages, prompt=prompt)
        return len(prefix) if prefix is not None and self.text.startswith(prefix) else None

    def _opens_without_header(self, index: int, prompt_end: int) -> bool:
        """Whether nothing but blanks is written between the prompt and what is said after it."""
        word = self._stand_in()
        other = self._try_render([*self.messages[:index], self._saying(index, content=word)])
        before = (other or "").partition(word)[0]
        same = before.startswith(self.text[:prompt_end])
        return same and not before[prompt_end:].strip()

    # By difference.

    def _content(self, index: int) -> Span:
        """Where the rendering differs from one with a stand-in for all that the turn says."""
        word = self._stand_in()
        span = self._difference(index, content=word)
        if span is None and self.messages[index].get("reasoning_content"):
            span = self._difference(index, reasoning_content=f"{word}a", content=f"{word}b")
        if span is None:
            raise self._unclear(index)
        return span

    def _difference(self, index: int, **words: str) -> Span | None:
        """None where a word is left out or said twice, or where more differs than the turn."""
        after = self.messages[index + 1 :]
        other = self._try_render([*self.messages[:index], self._saying(index, **words), *after])
        if other is None or any(other.count(word) != 1 for word in words.values()):
            return None
        start = min(other.index(word) for word in words.values())
        rest = other[max(other.index(word) + len(word) for word in words.values()) :]
        stop = len(self.text) - len(rest)
        same = self.text[:start] == other[:start] and self.text.endswith(rest)
        left_out = start == stop and any(map(str.strip, _said(self.messages[index])))
        return (start, stop) if same and start <= stop and not left_out else None

    def _past_end_token(self, start: int, stop: int) -> int:
        """The end of [start, stop), or of the end-of-turn token that follows it."""
        if self.template.ends_with_special(self.text[start:stop]):
            return stop
        end = self.template.end_token.match(self.text, stop)
        return end.end() if end else stop

    def _refuse_if_reached_from_after(self, index: int, stop: int) -> None:
        """Later messages must not change the text up to `stop`: a tool's result may stand there."""
        words = (f"{self._stand_in()}{number}" for number in itertools.count())
        after = [{**message, "content": next(words)} for message in self.messages[index + 1 :]]
        other = self._try_render([*self.messages[: index + 1], *after])
        if other is None or other[:stop] != self.text[:stop]:
            raise self._unclear(index)

    def _refuse_if_left_out(self, index: int) -> None:
        """A template may write an answer otherwise than it stands, but write it it must."""
        word = self._stand_in()
        after = self.messages[index + 1 :]
        other = self._try_render(
            [*self.messages[:index], self._saying(index, content=word), *after]
        )
        if self.messages[index].get("tool_calls") or word not in (other or ""):
            raise self._unclear(index)

    # What both need.

    def _try_render(self, messages: list[TemplateMessage], *, prompt: bool = False) -> str | None:
        """None where a part or a variant of the conversation breaks the template's rules."""
        try:
            return self.template.render(messages, prompt=prompt)
        except TemplateRefusalError:
            return None

    def _saying(self, index: int, **words: str) -> TemplateMessage:
        """A turn that says nothing but `words`."""
        said = ("content", "reasoning_content", "tool_calls")
        kept = {key: value for key, value in self.messages[index].items() if key not in said}
        return {**kept, **words}

    def _shows(self, index: int, span: Span) -> bool:
        """Whether what the turn says stands in the span, word for word."""
        shown = self.text[slice(*span)]
        return all(part.strip() in shown for part in _said(self.messages[index]))

    def _stand_in(self) -> str:
        """A word that is nowhere in the text."""
        word = "standin"
        while word in self.text:
            word += "x"
        return word

    def _unclear(self, index: int) -> UnclearTurnError:
        role = self.messages[index]["role"]
        return UnclearTurnError(
            f"message {index + 1} ({role}) cannot be told from the rest in what the chat template "
            f"renders."
        )


def _said(message: TemplateMessage) -> list[str]:
    """What a template has to show of a turn: its calls, else its content, else its thoughts.

    Beside calls many templates leave out the content, and most leave out earlier thoughts.
    """
    calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
    return calls or [message.get("content") or message.get("reasoning_content") or ""]
