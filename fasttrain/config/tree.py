"""The config between YAML and the typed sections: values that know where they were written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath
from typing import Any, Literal


@dataclass(frozen=True)
class Origin:
    """Where a value was written, or why it has been put there."""

    kind: Literal["file", "command line", "python", "derived", "default"]
    file: str = ""
    line: int = 0  # 1-based; 0 is the file as a whole
    column: int = 0  # 1-based
    environment: str = ""  # the variable that gave the value
    reason: str = ""  # of a derived value

    @property
    def where(self) -> str:
        """The place as an error message names it."""
        if self.file:
            return f"{self.file}:{self.line}" if self.line else self.file
        return "command line" if self.kind == "command line" else ""

    def __str__(self) -> str:
        if self.environment:
            place = f" ({self.where})" if self.where else ""
            return f"env {self.environment}{place}"
        if self.kind == "derived":
            return f"derived: {self.reason}"
        return self.where or self.kind

    def derived(self, reason: str) -> Origin:
        """The same place, for a value that follows from what stands there."""
        return replace(self, kind="derived", reason=reason, environment="")


@dataclass(frozen=True)
class Entry:
    """In a key path: the entry of a list whose `type` is this."""

    type: str


Step = str | int | Entry
KeyPath = tuple[Step, ...]


@dataclass
class Node:
    """A scalar, a `dict[str, Node]` or a `list[Node]`, and its origin."""

    value: Any
    origin: Origin
    raw: str | None = None  # its text, where the schema may still want a string
    masked: str | None = None  # what is shown instead of a secret

    @property
    def is_mapping(self) -> bool:
        return isinstance(self.value, dict)

    @property
    def is_list(self) -> bool:
        return isinstance(self.value, list)

    def children(self) -> list[tuple[str | int, Node]]:
        """The parts by key or index; none for a scalar."""
        if self.is_mapping:
            return list(self.value.items())
        return list(enumerate(self.value)) if self.is_list else []


def from_plain(value: Any, origin: Origin) -> Node:
    """A tree all of whose parts have one origin."""
    if isinstance(value, Node):
        return value
    if isinstance(value, Mapping):
        return Node({str(key): from_plain(part, origin) for key, part in value.items()}, origin)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return Node([from_plain(part, origin) for part in value], origin)
    return Node(fspath(value) if isinstance(value, PathLike) else value, origin)


def plain(node: Node) -> Any:
    """The values alone."""
    if node.is_mapping:
        return {key: plain(part) for key, part in node.value.items()}
    return [plain(part) for part in node.value] if node.is_list else node.value


def copied(node: Node) -> Node:
    """A tree that shares no node with this one."""
    if node.is_mapping:
        return replace(node, value={key: copied(part) for key, part in node.value.items()})
    if node.is_list:
        return replace(node, value=[copied(part) for part in node.value])
    return replace(node)


def size(node: Node) -> int:
    """How many nodes there are."""
    return 1 + sum(size(part) for _, part in node.children())


def depth(node: Node) -> int:
    """How many levels lie below."""
    return max((1 + depth(part) for _, part in node.children()), default=0)


# --- key paths -----------------------------------------------------------------------------------


def key_text(path: Sequence[Step]) -> str:
    """`data.sources[2].split`"""
    text = ""
    for step in path:
        if isinstance(step, str):
            text += f".{step}" if text else step
        else:
            text += f"[{step.type if isinstance(step, Entry) else step}]"
    return text


def parse_key(text: str) -> KeyPath | None:
    """The path of `callbacks.0.patience`, `callbacks[0].patience` or `model.transforms[lora].r`;
    None where the text is no path."""
    steps: list[Step] = []
    for part in text.split("."):
        match = re.fullmatch(r"([\w-]+)((?:\[\w+\])*)", part)
        if match is None:
            return None
        steps.append(int(match[1]) if match[1].isdigit() else match[1])
        for index in re.findall(r"\[(\w+)\]", match[2]):
            steps.append(int(index) if index.isdigit() else Entry(index))
    return tuple(steps)


def find(root: Node, path: Sequence[Step]) -> Node | None:
    """The node at `path`, if there is one."""
    node: Node | None = root
    for step in path:
        if node is None:
            return None
        node = _part(node, step)
    return node


def nearest(root: Node, path: Sequence[Step]) -> Node:
    """The deepest node that exists on the way to `path`."""
    node = root
    for step in path:
        part = _part(node, step)
        if part is None:
            return node
        node = part
    return node


def _part(node: Node, step: Step) -> Node | None:
    if node.is_mapping and isinstance(step, str):
        found: Node | None = node.value.get(step)
        return found
    if node.is_list:
        index = entry_index(node, step)
        return node.value[index] if index is not None else None
    return None


def entry_index(node: Node, step: Step) -> int | None:
    """Which item of a list `step` means."""
    if isinstance(step, int):
        return step if step < len(node.value) else None
    if isinstance(step, Entry):
        for index, item in enumerate(node.value):
            kind = item.value.get("type") if item.is_mapping else None
            if kind is not None and kind.value == step.type:
                return index
    return None


def assign(root: Node, path: KeyPath, value: Node) -> None:
    """Put `value` at `path`, making mappings and `[type]` entries on the way.

    Raises LookupError, with the reason, where a list has no such item or a scalar has no parts.
    """
    node = root
    for position, step in enumerate(path[:-1]):
        part = _part(node, step)
        if part is None:
            empty: Any = [] if isinstance(path[position + 1], Entry) else {}
            part = Node(empty, value.origin)
            _put(node, path[: position + 1], part)
        node = part
    _put(node, path, value)


def _put(node: Node, path: KeyPath, value: Node) -> None:
    step, parent = path[-1], key_text(path[:-1])
    if node.is_mapping and isinstance(step, str):
        node.value[step] = value
    elif node.is_list and isinstance(step, Entry):
        _put_entry(node, step, value)
    elif node.is_list and isinstance(step, int) and step < len(node.value):
        node.value[step] = value
    elif node.is_list:
        count = len(node.value)
        raise LookupError(f"{parent} is a list of {count}, which has no '{_step_text(step)}'")
    else:
        kind = "a mapping" if node.is_mapping else "a single value"
        raise LookupError(f"{parent} is {kind}, which has no '{_step_text(step)}'")


def _put_entry(node: Node, step: Entry, value: Node) -> None:
    """Replace or append the entry of that type; the type is written into it."""
    assert value.is_mapping, "an entry of a component list is a mapping"
    value.value.setdefault("type", Node(step.type, value.origin))
    index = entry_index(node, step)
    if index is None:
        node.value.append(value)
    else:
        node.value[index] = value


def _step_text(step: Step) -> str:
    return step.type if isinstance(step, Entry) else str(step)


def merged(base: Node, child: Node, default_types: Mapping[str, str]) -> Node:
    """`child` over `base`: mappings key by key, all else replaced.

    A section whose `type` changes is replaced as a whole, since its options mean another component.
    """
    parts = dict(base.value)
    for key, part in child.value.items():
        parts[key] = _merged_part(parts.get(key), part, default_types.get(key))
    return Node(parts, child.origin)


def _merged_part(base: Node | None, child: Node, default_type: str | None) -> Node:
    if base is None or not (base.is_mapping and child.is_mapping):
        return child
    new = child.value.get("type")
    old = base.value.get("type")
    if new is not None and new.value != (old.value if old is not None else default_type):
        return child
    return merged(base, child, {})
