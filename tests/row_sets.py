"""Small row sets as the first half of the data block hands them over."""

from __future__ import annotations

from collections.abc import Iterable

from datasets import Dataset

from fasttrain.core.data_report import SourceReport
from fasttrain.data.conversation import Conversation, Message
from fasttrain.data.load import Rows


def chat(*turns: str, **last: object) -> str:
    """A conversation of turns, the user's first; `last` are further fields of the last one."""
    roles = ("user", "assistant")
    messages = [Message(roles[i % 2], turn) for i, turn in enumerate(turns[:-1])]
    messages.append(Message(roles[(len(turns) - 1) % 2], turns[-1], **last))
    return Conversation(tuple(messages)).to_json()


def dataset(
    *, chats: Iterable[str] = (), texts: Iterable[str] = (), source: str = "train.jsonl"
) -> Dataset:
    """Conversations (JSON), then plain texts."""
    chats, texts = list(chats), list(texts)
    count = len(chats) + len(texts)
    return Dataset.from_dict(
        {
            "kind": ["conversation"] * len(chats) + ["text"] * len(texts),
            "messages": chats + [""] * len(texts),
            "text": [""] * len(chats) + texts,
            "source": [source] * count,
            "group": [""] * count,
            "origin": [f"{source}:{number + 1}" for number in range(count)],
        }
    )


def rows(train: Dataset, evaluation: Dataset | None = None) -> Rows:
    """As load_rows gives them, for sources that were read without a loss."""
    parts = [part for part in (train, evaluation) if part is not None]
    names = [name for part in parts for name in part["source"]]
    reports = tuple(
        SourceReport(name, "made by a test", names.count(name), names.count(name))
        for name in dict.fromkeys(names)
    )
    kinds = {kind for part in parts for kind in part["kind"]}
    return Rows(train, evaluation, reports, "conversation" in kinds)
