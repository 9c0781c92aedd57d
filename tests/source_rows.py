"""Loads rows as a run does, for the tests of sources, detection and conversion."""

import json
from pathlib import Path

from fasttrain.config.schema.data import DataSection, FileSourceConfig
from fasttrain.core.events import Hooks
from fasttrain.core.interfaces import Examples
from fasttrain.data.load import load_rows

FIXTURES = Path(__file__).parent / "data" / "fixtures"


def load(*sources, seed=0, examples=None, hooks=None, **options):
    """Rows of `sources`: paths, or source sections."""
    sections = [
        FileSourceConfig(path=str(source)) if isinstance(source, (str, Path)) else source
        for source in sources
    ]
    return load_rows(
        DataSection(sources=sections, **options),
        examples=examples or Examples(),
        seed=seed,
        hooks=hooks or Hooks(),
    )


def turns(row):
    """(role, content) of a normalised row's messages."""
    return [(message["role"], message.get("content")) for message in json.loads(row["messages"])]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chats(count, **more):
    """`count` rows of messages, all different."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"question {number}"},
                {"role": "assistant", "content": f"answer {number}"},
            ],
            **more,
        }
        for number in range(count)
    ]
