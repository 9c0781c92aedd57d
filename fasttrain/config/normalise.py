"""Short forms into full ones: `optimizer: adamw`, `model: DIR`, `callbacks: [samples]`."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from fasttrain.config.registry import SOURCES, TOKENIZERS
from fasttrain.config.tree import KeyPath, Node, Origin, find

DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".txt")

# A section given as one value: the option that the value stands for.
SHORT_SECTIONS = {
    "model": "name_or_path",
    "tokenizer": "name_or_path",
    "data": "sources",
    "optimizer": "type",
    "scheduler": "type",
    "engine": "type",
    "kernels": "mode",
}
SECTIONS = (*SHORT_SECTIONS, "trainer", "eval", "logging")
COMPONENT_LISTS: tuple[KeyPath, ...] = (("checkpoint",), ("callbacks",), ("model", "transforms"))
SOURCE_LISTS: tuple[KeyPath, ...] = (("data", "sources"), ("data", "eval_sources"))


def normalise(root: Node) -> None:
    """Expand every short form of the tree, in place. Doing it twice changes nothing."""
    for key in SECTIONS:
        if key in root.value:
            _expand_section(key, root.value[key])
    for path in COMPONENT_LISTS:
        for entry in _entries(root, path):
            if isinstance(entry.value, str):
                entry.value = {"type": replace(entry)}
    for path in SOURCE_LISTS:
        for entry in _entries(root, path):
            _expand_source(entry)


def _expand_section(key: str, node: Node) -> None:
    """An empty section is an empty mapping; text (for data also a list) is its main option."""
    if node.value is None:
        node.value = {}
    option = SHORT_SECTIONS.get(key)
    if key == "tokenizer" and node.value in TOKENIZERS.names():
        option = "type"
    if option and (isinstance(node.value, str) or (key == "data" and node.is_list)):
        node.value = {option: replace(node)}
        node.raw = node.masked = None


def _entries(root: Node, path: KeyPath) -> list[Node]:
    """The items of a list of components. One alone may stand without brackets."""
    node = find(root, path)
    if node is None:
        return []
    if node.value is None:
        node.value = []
    elif isinstance(node.value, str) or node.is_mapping:
        node.value = [replace(node)]
    return node.value if node.is_list else []


def _expand_source(entry: Node) -> None:
    """Give a source its `type`, by what it names."""
    origin = entry.origin
    if isinstance(entry.value, str):
        kind, reason = _source_type(entry.value)
        option = {"file": "path", "huggingface": "name_or_path"}.get(kind)
        named: dict[str, Any] = {option: replace(entry)} if option else {}
        entry.value = {"type": Node(kind, origin.derived(reason)), **named}
        entry.raw = entry.masked = None
    elif entry.is_mapping and "type" not in entry.value:
        _infer_type(entry, origin)


def _infer_type(entry: Node, origin: Origin) -> None:
    for option, kind in (("path", "file"), ("name_or_path", "huggingface")):
        if option in entry.value:
            derived = Node(kind, origin.derived(f"it has `{option}`"))
            entry.value = {"type": derived, **entry.value}
            return


def _source_type(text: str) -> tuple[str, str]:
    """(type, reason) of a source written as text."""
    path = os.path.expanduser(text)
    if os.path.isdir(path) and _is_saved_dataset(path):
        return "huggingface", "a directory written by save_to_disk"
    if os.path.exists(path):
        return "file", "an existing path"
    if text in SOURCES.names():
        return text, "a registered source"
    if looks_like_path(text):
        return "file", "it looks like a path"
    return "huggingface", "neither a path nor a registered source"


def looks_like_path(text: str) -> bool:
    """Whether text that names nothing on disk was meant to: a glob, a data suffix, `./`, `~`."""
    stem = text.removesuffix(".gz")
    return (
        text.startswith(("/", "./", "../", "~"))
        or any(sign in text for sign in "*?[")
        or stem.endswith(DATA_SUFFIXES)
    )


def _is_saved_dataset(directory: str) -> bool:
    return any(
        os.path.exists(os.path.join(directory, name))
        for name in ("state.json", "dataset_dict.json")
    )
