"""From a row to what is learnt: a conversation, or plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from fasttrain.data.conversation import Conversation, Message
from fasttrain.data.messages import RowError, kind_of, looks_like_messages, read_messages

Supervise = Literal["answers", "all"]


def convert_text(row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """The text of a row; RowError where there is none."""
    column = columns["text"]
    text = _required_text(row, column)
    if not text.strip():
        raise RowError("empty text", column)
    return text


def convert_conversation(
    row: Mapping[str, Any], columns: Mapping[str, str], supervise: Supervise
) -> Conversation:
    """The conversation of a row; RowError where it is malformed or teaches nothing.

    `columns` maps roles to columns: `messages`, or `prompt` and `response` with `input` and
    `history`; either with `system`.
    """
    if "messages" in columns:
        messages = read_messages(row.get(columns["messages"]), columns["messages"])
    else:
        messages = _history(row, columns) + _prompt(row, columns) + _response(row, columns)
    _check(messages, columns, supervise)
    system = _optional_text(row, columns.get("system"))
    if system and not any(message.role == "system" for message in messages):
        messages.insert(0, Message("system", system))
    return Conversation(tuple(messages))


def _prompt(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[Message]:
    column = columns["prompt"]
    value = row.get(column)
    more = _optional_text(row, columns.get("input"))
    if looks_like_messages(value):
        return read_messages(value, column)
    text = _required_text(row, column)
    prompt = "\n\n".join(part for part in (text, more) if part.strip())
    if not prompt:
        raise RowError("empty prompt", column)
    return [Message("user", prompt)]


def _response(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[Message]:
    column = columns["response"]
    value = row.get(column)
    if looks_like_messages(value):
        return read_messages(value, column)
    return [Message("assistant", _required_text(row, column))]


def _history(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[Message]:
    """Earlier turns as a list of [question, answer] pairs."""
    column = columns.get("history")
    messages: list[Message] = []
    for index, pair in enumerate((row.get(column) or []) if column else []):
        if not (isinstance(pair, list) and [type(part) for part in pair] == [str, str]):
            detail = f"({kind_of(pair)}; expected a pair [question, answer])"
            raise RowError("wrong type", f"{column}[{index}]", detail)
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    return messages


def _required_text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        raise RowError("null text", column)
    if not isinstance(value, str):
        raise RowError("wrong type", column, f"({kind_of(value)}; expected text)")
    return value


def _optional_text(row: Mapping[str, Any], column: str | None) -> str:
    if column is None or row.get(column) is None:
        return ""
    return _required_text(row, column)


def _check(messages: list[Message], columns: Mapping[str, str], supervise: Supervise) -> None:
    """A conversation must hold something to learn."""
    field = columns.get("messages") or columns["response"]
    if supervise == "all":
        if not any(message.content or message.tool_calls for message in messages):
            raise RowError("empty conversation", field)
        return
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise RowError("no assistant turn", field)
    trained = [message for message in answers if message.train is not False]
    if not trained and not any(message.train for message in messages):
        raise RowError("every turn is excluded from training", field)
    for message in trained:
        if not ((message.content or "").strip() or message.tool_calls or message.reasoning):
            index = f"[{messages.index(message)}]" if "messages" in columns else ""
            raise RowError("empty answer", f"{field}{index}")
