"""Instruction pairs from the running Python's standard library: real text that every machine has.

The sources are parsed, never imported, so nothing runs. The same Python gives the same rows.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from datasets import Dataset

from fasttrain.config.errors import Problem, UserError
from fasttrain.config.schema.data import PythonStdlibSourceConfig
from fasttrain.core.interfaces import Source
from fasttrain.data.arrow_file import ArrowFile
from fasttrain.data.sources import GROUP, ORIGIN

# No part of the library that people use, or a second copy of another part's text.
EXCLUDED = frozenset(
    [
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "ensurepip",
        "pydoc_data",
        "ntpath",
        "antigravity",
        "this",
        "__pycache__",
        "__phello__",
        "site-packages",
        "dist-packages",
    ]
)
# Modules that are imported under another name than their file's.
PUBLIC_NAMES = {"posixpath": "os.path"}

MIN_ANSWER, MAX_ANSWER = 16, 320  # characters; a small model's document stays below 150 tokens
MAX_SIGNATURE = 96
_CALL_LINE = re.compile(r"^[\w.]+\(.*\)(\s*->.*)?$", re.DOTALL)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")

_Function = ast.FunctionDef | ast.AsyncFunctionDef


class Documented(NamedTuple):
    """One thing that has a docstring."""

    kind: str  # "module", "class", "function", "method" or "attribute"
    module: str
    name: str  # dotted, below the module; "" for the module itself
    signature: str  # "(a, b=1)"; "" where there is none
    summary: str  # the docstring's first paragraph, on one line
    line: int


class Pair(NamedTuple):
    """One row."""

    prompt: str
    response: str
    group: str
    origin: str


class PythonStdlibSource(Source):
    """What functions, classes and modules do, how they are called, and what they are named."""

    Config = PythonStdlibSourceConfig

    def load(self) -> Dataset:
        """Columns `prompt`, `response`, and `group`: the top-level module, held out whole."""
        pairs = list(stdlib_pairs(Path(sysconfig.get_path("stdlib"))))
        if not pairs:
            raise UserError(
                Problem(
                    f"this Python's standard library has no source files "
                    f"({sysconfig.get_path('stdlib')}).",
                    key="data.sources",
                    hint="Give a file: data.sources=[my.jsonl].",
                )
            )
        columns = ("prompt", "response", GROUP, ORIGIN)
        with ArrowFile(pa.schema([(column, pa.string()) for column in columns])) as file:
            for pair in pairs:
                file.add(pair)
            return file.dataset()


def stdlib_pairs(root: Path) -> Iterator[Pair]:
    """All pairs, in order of file names and lines. No question and no answer occurs twice."""
    seen: set[str] = set()
    for path in _module_files(root):
        module = _module_name(path.relative_to(root))
        group = module.partition(".")[0]
        for item in _documented(path, module):
            # Inherited docstrings are repeated in subclasses: the first one stands for all.
            if item.summary in seen:
                continue
            seen.add(item.summary)
            for prompt, response in _questions(item):
                if prompt not in seen:
                    seen.add(prompt)
                    origin = f"{path.relative_to(root)}:{item.line}"
                    yield Pair(prompt, response, group, origin)


def _module_files(root: Path) -> list[Path]:
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        top = parts[0]
        if top in sys.stdlib_module_names and not any(_is_left_out(part) for part in parts):
            found.append(path)
    return found


def _is_left_out(part: str) -> bool:
    if part in EXCLUDED:
        return True
    # _pydecimal is the documented source of decimal; other private modules are nobody's to call.
    return part.startswith("_") and part != "__init__" and not part.startswith("_py")


def _module_name(relative: Path) -> str:
    parts = [*relative.with_suffix("").parts]
    if parts[-1] == "__init__":
        parts.pop()
    name = ".".join(part.removeprefix("_py") for part in parts)
    return PUBLIC_NAMES.get(name, name)


def _documented(path: Path, module: str) -> Iterator[Documented]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes such as "\d" in docstrings
        tree = ast.parse(path.read_bytes())
    summary = _summary(tree)
    if summary:
        yield Documented("module", module, "", "", summary, 1)
    yield from _members(tree.body, module, owner="")


def _members(body: list[ast.stmt], module: str, owner: str) -> Iterator[Documented]:
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from _members([*node.body, *node.orelse], module, owner)
        if not isinstance(node, _Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        name = f"{owner}.{node.name}" if owner else node.name
        summary = _summary(node)
        if isinstance(node, ast.ClassDef):
            if summary:
                yield Documented("class", module, name, _constructor(node), summary, node.lineno)
            yield from _members(node.body, module, name)
        elif summary:
            kind, signature = _callable(node, is_method=bool(owner))
            if kind:
                yield Documented(kind, module, name, signature, summary, node.lineno)


def _callable(node: _Function, *, is_method: bool) -> tuple[str, str]:
    """Kind and signature; ("", "") for what is no reader's business, such as a setter."""
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    if any(name.endswith((".setter", ".deleter", "overload")) for name in decorators):
        return "", ""
    if any(name.endswith("property") for name in decorators):
        return "attribute", ""
    bound = is_method and "staticmethod" not in decorators
    return ("method" if is_method else "function"), _signature(node.args, bound=bound)


def _constructor(node: ast.ClassDef) -> str:
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            return _signature(member.args, bound=True)
    return ""


def _signature(arguments: ast.arguments, *, bound: bool) -> str:
    """As it is written, without `self` and annotations; without defaults where it gets long."""
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    if bound:
        positional = arguments.posonlyargs or arguments.args
        if positional and len(arguments.defaults) < len(arguments.posonlyargs + arguments.args):
            positional.pop(0)
    text = f"({ast.unparse(arguments)})"
    if len(text) <= MAX_SIGNATURE:
        return text
    names = [argument.arg for argument in arguments.posonlyargs + arguments.args]
    text = f"({', '.join([*names, '...'])})"
    return text if len(text) <= MAX_SIGNATURE else "(...)"


def _summary(node: _Function | ast.ClassDef | ast.Module) -> str:
    """The first paragraph of the docstring that says something, on one line; "" where none does."""
    docstring = ast.get_docstring(node, clean=False)
    if not docstring:
        return ""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring))[:2]:
        text = " ".join(paragraph.split())
        if not _CALL_LINE.match(text):
            return _shortened(text)
    return ""


def _shortened(text: str) -> str:
    """Whole sentences up to MAX_ANSWER; "" where that leaves nothing, or no sentence."""
    while len(text) > MAX_ANSWER:
        *sentences, _ = _SENTENCE_END.split(text)
        text = " ".join(sentences)
    unfinished = text.endswith((":", ",")) or ">>>" in text or text.startswith("$")
    return "" if unfinished or len(text) < MIN_ANSWER or text.count(" ") < 2 else text


def _questions(item: Documented) -> Iterator[tuple[str, str]]:
    """What can be asked about a thing, and the answers."""
    full = f"{item.module}.{item.name}" if item.name else item.module
    shown = f"`{full}{item.signature}`"
    if item.kind == "module":
        yield f"What is the module `{item.module}` for?", item.summary
    elif item.kind == "class":
        yield f"What is the class {shown}?", item.summary
    elif item.kind == "attribute":
        yield f"What is the attribute `{full}`?", item.summary
    else:
        yield f"What does {shown} do?", item.summary
    if item.kind in ("function", "method") and item.signature not in ("()", "(...)"):
        yield f"How do I call `{full}`?", shown
    if item.kind == "function":
        described = _SENTENCE_END.split(item.summary)[0].rstrip(".")
        yield f"Which function of `{item.module}` fits this: {described}?", shown
