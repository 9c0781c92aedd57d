"""The names public datasets give to the columns we look for, and a source's first rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fasttrain.data.messages import looks_like_messages

# Questions and what answers them.
PAIRS: tuple[tuple[str, str], ...] = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "output"),
    ("prompt", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("instruction", "completion"),
    ("instruction", "answer"),
    ("question", "answer"),
    ("question", "response"),
    ("question", "solution"),
    ("query", "response"),
    ("query", "answer"),
    ("problem", "solution"),
    ("problem", "answer"),
    ("input", "output"),
    ("user", "assistant"),
    ("human", "assistant"),
    ("source", "target"),
)
PROMPT_NAMES = tuple(dict.fromkeys(prompt for prompt, _ in PAIRS))
RESPONSE_NAMES = tuple(dict.fromkeys(response for _, response in PAIRS))
INPUT_NAMES = ("input", "context")  # extend an instruction: alpaca's and Dolly's
MESSAGES_NAMES = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
TEXT_NAMES = ("text", "content", "document", "raw_content")
SYSTEM_NAMES = ("system", "system_prompt")
HISTORY_NAMES = ("history",)
CHOSEN_NAMES = ("chosen", "chosen_messages")
REJECTED_NAMES = ("rejected", "rejected_messages")


@dataclass(frozen=True)
class Sample:
    """A source's columns and first rows."""

    columns: tuple[str, ...]
    rows: Sequence[Mapping[str, Any]]
    key: str = ""  # of the source in the config, for errors

    @cached_property
    def by_name(self) -> dict[str, str]:
        """Lower-case names → columns."""
        return {column.lower(): column for column in self.columns}

    def named(self, names: Sequence[str]) -> list[str]:
        """The columns that bear one of `names`, in the order of `names`."""
        return [self.by_name[name] for name in names if name in self.by_name]

    def values(self, column: str) -> list[Any]:
        """What the first rows hold there, nulls left out."""
        return [row[column] for row in self.rows if row.get(column) is not None]

    def is_text(self, column: str) -> bool:
        """Most values are text. Not all: one bad row must be named as such, not hide the format."""
        values = self.values(column)
        return 2 * sum(isinstance(value, str) for value in values) > len(values)

    def is_messages(self, column: str) -> bool:
        """Most values are lists of messages; or lists or JSON texts whose column's name says so."""
        values = [value for value in self.values(column) if value not in ([], "")]
        if 2 * sum(looks_like_messages(value) for value in values) > len(values):
            return True
        if column.lower() not in MESSAGES_NAMES:
            return False
        if self.is_text(column):
            return bool(values) and str(values[0]).lstrip().startswith("[")
        return self.type_of_values(column) == "list"

    def type_of(self, column: str) -> str:
        """What a column holds, in a word."""
        return "messages" if self.is_messages(column) else self.type_of_values(column)

    def type_of_values(self, column: str) -> str:
        """The same by the Python types alone."""
        names = {str: "text", bool: "true/false", int: "number", float: "number", list: "list"}
        types = {names.get(type(value), "object") for value in self.values(column)}
        return " or ".join(sorted(types)) or "null"
