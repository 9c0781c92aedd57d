"""YAML into a tree of nodes that know their line. Nothing is ever constructed from a tag.

The scalars are those of YAML 1.2: `1e-5` is a number, `on`, `yes` and `no` are text. PyYAML's
parser gives the events; everything after that is ours, so that depth, anchors and keys are checked
while reading.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from typing import Any

import yaml

from fasttrain.config.errors import Problem, UserError
from fasttrain.config.tree import KeyPath, Node, Origin, copied, depth, key_text, size

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_NODES = 20_000  # aliases unfolded; recipes have some hundred
MAX_DIGITS = 64  # a longer number stays text, and the schema refuses it

_NULL = ("", "~", "null", "Null", "NULL")
_BOOLEANS = {
    f: word[0] in "tT" for word in ("true", "false") for f in (word, word.title(), word.upper())
}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

OriginAt = Callable[[int, int], Origin]  # (line, column), 1-based


def read_file(path: str) -> str:
    """The text of a config file. UserError where it is no small, regular UTF-8 file."""
    if "://" in path:
        raise _error(path, "a config is read from a local file, never from an address.")
    try:
        mode = os.stat(path)
        _refuse_special(path, mode)
        with open(path, "rb") as stream:
            data = stream.read()
    except FileNotFoundError:
        raise _error(path, "no such file.") from None
    except OSError as error:
        raise _error(path, f"cannot be read ({error.strerror}).") from None
    return _decoded(path, data)


def _refuse_special(path: str, mode: os.stat_result) -> None:
    if stat.S_ISDIR(mode.st_mode):
        raise _error(path, "is a directory (expected a YAML file).")
    if not stat.S_ISREG(mode.st_mode):
        raise _error(path, "is no regular file.")
    if mode.st_size > MAX_BYTES:
        raise _error(path, f"is too large for a config (got {mode.st_size} bytes, at most 1 MiB).")


def _decoded(path: str, data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _error(path, "is UTF-16 (a byte order mark at offset 0).", "Save it as UTF-8.")
    if data.startswith(b"\xef\xbb\xbf"):
        raise _error(
            path, "starts with a byte order mark (offset 0).", "Save it as UTF-8 without BOM."
        )
    if b"\0" in data:
        offset = data.index(b"\0")
        raise _error(f"{path}:{_line(data, offset)}", f"a NUL byte at offset {offset}.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"{path}:{_line(data, error.start)}"
        byte = data[error.start]
        raise _error(
            where, f"byte 0x{byte:02x} at offset {error.start} is not UTF-8.", "Save it as UTF-8."
        ) from None


def _line(data: bytes, offset: int) -> int:
    return data.count(b"\n", 0, offset) + 1


def _error(where: str, what: str, hint: str = "") -> UserError:
    return UserError(Problem(what, where=where, hint=hint))


# --- parsing -------------------------------------------------------------------------------------


def parse(text: str, origin_at: OriginAt, problems: list[Problem]) -> Node:
    """The tree of one YAML document.

    Duplicate and non-text keys, tags and merge keys are added to `problems`; what cannot be read at
    all is a UserError.
    """
    builder = _TreeBuilder(text, origin_at, problems)
    try:
        return builder.document()
    except yaml.reader.ReaderError as error:
        offset = getattr(error, "position", 0)
        where = origin_at(text.count("\n", 0, offset) + 1, 0).where
        character = ord(text[offset]) if offset < len(text) else 0
        raise _error(where, f"the control character U+{character:04X} is not YAML.") from None
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, origin_at) from None


def _syntax_error(error: yaml.MarkedYAMLError, origin_at: OriginAt) -> UserError:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    what = error.problem or error.context or "not readable"
    if "'\\t'" in what:
        what = "a tab where YAML wants spaces"
    where = origin_at(line, column).where
    return _error(where, f"not valid YAML: {what} (column {column}).")


class _TreeBuilder:
    """Turns parser events into nodes, in one pass."""

    def __init__(self, text: str, origin_at: OriginAt, problems: list[Problem]) -> None:
        self._events = yaml.parse(text, Loader=yaml.SafeLoader)
        self._origin_at = origin_at
        self._problems = problems
        self._anchors: dict[str, Node | None] = {}  # None while the anchored node is being read
        self._count = 0

    def document(self) -> Node:
        """The only document; a null node where there is none."""
        next(self._events)  # stream start
        event = next(self._events)
        if isinstance(event, yaml.StreamEndEvent):
            return Node(None, self._origin_at(0, 0))
        root = self._node(next(self._events), ())
        next(self._events)  # document end
        event = next(self._events)
        if isinstance(event, yaml.DocumentStartEvent):
            where = self._origin(event).where
            raise _error(where, "a second document ('---').", "A config is one document.")
        return root

    def _origin(self, event: Any) -> Origin:
        return self._origin_at(event.start_mark.line + 1, event.start_mark.column + 1)

    def _node(self, event: Any, path: KeyPath) -> Node:
        origin = self._origin(event)
        if isinstance(event, yaml.AliasEvent):
            return self._unfolded(str(event.anchor), origin, path)
        self._spend(1, len(path), origin)
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._report(origin, path, f"the tag '{tag}' is not read.", "Remove it.")
        node = Node(self._value(event, path), origin)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _value(self, event: Any, path: KeyPath) -> Any:
        if isinstance(event, yaml.ScalarEvent):
            return resolve_scalar(event.value) if event.implicit[0] else event.value
        if isinstance(event, yaml.SequenceStartEvent):
            return self._items(path)
        return self._pairs(path)

    def _items(self, path: KeyPath) -> list[Node]:
        items: list[Node] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            items.append(self._node(event, (*path, len(items))))
        return items

    def _pairs(self, path: KeyPath) -> dict[str, Node]:
        pairs: dict[str, Node] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            origin = self._origin(event)
            key = self._node(event, (*path, "?")).value
            named = key if isinstance(key, str) else "?"
            value = self._node(next(self._events), (*path, named))
            value.origin = origin
            self._add(pairs, key, value, path)
        return pairs

    def _add(self, pairs: dict[str, Node], key: Any, value: Node, path: KeyPath) -> None:
        origin = value.origin
        if key == "<<":
            hint = "Write the keys out, or use `extends`."
            self._report(origin, path, "the merge key '<<' is not read.", hint)
        elif not isinstance(key, str):
            shown = "a list or mapping" if isinstance(key, (list, dict)) else f"{key!r}"
            self._report(origin, path, f"a key that is not text (got {shown}).", "Quote it.")
        elif key in pairs:
            first = pairs[key].origin
            place = f" (first in line {first.line})" if first.line else ""
            self._report(origin, (*path, key), f"given twice{place}.", "Keep one.")
        else:
            pairs[key] = value

    def _unfolded(self, anchor: str, origin: Origin, path: KeyPath) -> Node:
        if anchor not in self._anchors:
            raise _error(
                origin.where, f"no anchor '&{anchor}' stands before the alias '*{anchor}'."
            )
        node = self._anchors[anchor]
        if node is None:
            raise _error(origin.where, f"the anchor '&{anchor}' contains itself.")
        self._spend(size(node), len(path) + depth(node), origin)
        return copied(node)

    def _spend(self, nodes: int, levels: int, origin: Origin) -> None:
        if levels > MAX_DEPTH:
            raise _error(origin.where, f"nested deeper than {MAX_DEPTH} levels.")
        self._count += nodes
        if self._count > MAX_NODES:
            raise _error(origin.where, f"more than {MAX_NODES} values, aliases unfolded.")

    def _report(self, origin: Origin, path: KeyPath, what: str, hint: str) -> None:
        self._problems.append(Problem(what, where=origin.where, key=key_text(path), hint=hint))


def resolve_scalar(text: str) -> Any:
    """The value of an unquoted scalar under YAML 1.2's core schema; octal and the like are text."""
    if text in _NULL:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if len(text) <= MAX_DIGITS and _INTEGER.fullmatch(text):
        return int(text)
    if len(text) <= MAX_DIGITS and _FLOAT.fullmatch(text):
        return float(text)
    if _SPECIAL.fullmatch(text):
        return float(text.replace(".", "", 1))
    return text
