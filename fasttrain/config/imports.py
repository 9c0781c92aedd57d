"""`imports:` the user's modules and files, executed once per config: their components register."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from dataclasses import dataclass
from types import ModuleType

from fasttrain.config.errors import Problem
from fasttrain.config.registry import IMPORTED_FILES, REGISTRIES
from fasttrain.config.tree import Node, key_text

# Files get a module name of their own: nothing goes on sys.path, no installed module is shadowed.
FILE_MODULES = "fasttrain_imported_"


@dataclass(frozen=True)
class Imported:
    """One resolved import."""

    name: str  # as written, a file as absolute path
    file: str  # where its code lies

    def __str__(self) -> str:
        return self.name if self.name == self.file else f"{self.name} ({self.file})"


def is_file_import(name: str) -> bool:
    """Whether an import means a file rather than a module."""
    return name.endswith(".py") or os.sep in name


def run_imports(nodes: list[tuple[Node, str]], problems: list[Problem]) -> list[Imported]:
    """Import each of (node, directory it is relative to), in order.

    Components that files of an earlier config registered in this process are forgotten first: a
    config sees what it would see in a process of its own.
    """
    IMPORTED_FILES.clear()
    for registry in REGISTRIES.values():
        registry.forget(FILE_MODULES)
    done: dict[str, Imported] = {}
    for index, (node, directory) in enumerate(nodes):
        if not isinstance(node.value, str):
            continue  # the schema says what is wrong with it
        name = node.value
        if is_file_import(name):
            name = os.path.abspath(os.path.join(directory, os.path.expanduser(name)))
            node.value = name
        if name not in done:
            problem = _import(name, done)
            if problem is not None:
                what, hint = problem
                key = key_text(("imports", index))
                problems.append(Problem(what, where=node.origin.where, key=key, hint=hint))
    return list(done.values())


def _import(name: str, done: dict[str, Imported]) -> tuple[str, str] | None:
    """Import one, or say what is wrong: (what, hint)."""
    is_file = is_file_import(name)
    if is_file and not os.path.isfile(name):
        return f"no such file (got '{name}').", "Paths are relative to the config file."
    try:
        module = _import_file(name) if is_file else importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not is_file and error.name is not None and name.startswith(error.name):
            hint = "Install it or put it on PYTHONPATH; a file is written as ./my_code.py."
            return f"no module '{name}'.", hint
        return _failure(name, error), ""
    except Exception as error:  # the user's code may raise anything
        return _failure(name, error), ""
    done[name] = Imported(name, module.__file__ or name)
    return None


def _import_file(path: str) -> ModuleType:
    stem = os.path.splitext(os.path.basename(path))[0]
    digest = hashlib.sha256(path.encode()).hexdigest()[:8]
    name = f"{FILE_MODULES}{digest}_{stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # typing and pickle look classes up by their module's name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    IMPORTED_FILES[stem] = name
    return module


def _failure(name: str, error: Exception) -> str:
    """The error with the line of the user's own code that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == name] or frames
    place = f"{os.path.basename(own[-1].filename)}:{own[-1].lineno}"
    text = str(error)
    if isinstance(error, SyntaxError) and error.filename:
        place, text = f"{os.path.basename(error.filename)}:{error.lineno}", error.msg
    first = text.split("\n")[0].rstrip(".")
    return f"importing it failed: {type(error).__name__}: {first} ({place})."
