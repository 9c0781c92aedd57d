"""Hashes of all that decides what tokens rows become, by content and never by name."""

from __future__ import annotations

import hashlib
import io
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from fasttrain.data import conversation, encode, masks, template, token_spans

_COLUMNS = ["kind", "messages", "text", "source", "origin"]
_CODE = (conversation, template, masks, token_spans, encode)
_LIBRARIES = ("tokenizers", "transformers", "jinja2")
# Rows hashed together. Part of what is hashed: another number gives other hashes.
_BATCH = 4096


def of_rows(rows: Dataset) -> str:
    """The rows' values in their order."""
    sink = _HashSink()
    schema = pa.schema([(name, pa.string()) for name in _COLUMNS])
    with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), schema) as stream:
        for table in rows.select_columns(_COLUMNS).with_format("arrow").iter(_BATCH):
            columns = [table[name].combine_chunks().cast(pa.string()) for name in _COLUMNS]
            stream.write_table(pa.table(columns, schema=schema))
    return sink.hash.hexdigest()


def of_tokenizer(tokenizer: Any) -> str:
    """Vocabulary, merges, added tokens and all that happens to a text on the way to ids."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # What the last call happened to set.
    del backend["truncation"], backend["padding"]
    return of_text(json.dumps([backend, tokenizer.special_tokens_map], sort_keys=True))


def of_code() -> str:
    """The modules that make tokens, and the libraries they stand on."""
    sources = [Path(str(module.__file__)).read_text(encoding="utf-8") for module in _CODE]
    return of_text(json.dumps([*sources, *(version(library) for library in _LIBRARIES)]))


def of_text(text: str) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


class _HashSink(io.RawIOBase):
    """A file that keeps nothing but the hash of what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.hash = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return len(memoryview(data))
