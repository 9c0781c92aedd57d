"""Writes the pages and files that follow from the code. A test fails when one is stale.

python docs/generate.py            write them
python docs/generate.py --check    exit 1 and name the stale ones
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from textwrap import dedent
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fasttrain.components import DEFAULT_TYPES  # noqa: E402
from fasttrain.config.aliases import ALIASES  # noqa: E402
from fasttrain.config.json_schema import config_schema  # noqa: E402
from fasttrain.config.registry import Registry  # noqa: E402
from fasttrain.config.resolve import FREE_TO_CHANGE  # noqa: E402
from fasttrain.config.schema.base import MAX_INT  # noqa: E402
from fasttrain.config.schema.root import TrainConfig  # noqa: E402
from fasttrain.config.sections import COMPONENT_LISTS, COMPONENTS  # noqa: E402
from fasttrain.core import events  # noqa: E402

GENERATED = "<!-- Written by docs/generate.py from fasttrain/config/schema. Do not edit. -->"
PLAIN_SECTIONS = {"kernels": "KernelsConfig", "eval": "EvalConfig", "logging": "LoggingConfig"}

INTRODUCTION = """\
# Config

A run is one YAML file. `fasttrain validate FILE` checks it without a GPU, network or weights,
`fasttrain show-config FILE` prints every value with its origin, and a run saves the same beside its
results as `config.resolved.yaml`. All problems are reported at once, each with file, line and key.

## How a file is read

- **YAML 1.2 scalars.** `1e-5` is a number; `on`, `yes` and `no` are text; `010` and `12:30` are no
  numbers. Duplicate keys, tags and merge keys (`<<`) are errors.
- **Human numbers.** `8k` is 8000, `4Ki` is 4096, and there are `M`, `B` (or `G`), `T` and `Mi`,
  `Gi`, `Ti`; further `1e6`, `2^20`, `1_000` and, for shares, `50%`.
- **Paths** of data, models and outputs are relative to the working directory; those of `extends`
  and `imports` to the file that names them. `~` is the home directory.
- **Short forms.** `optimizer: adamw` means `optimizer: {type: adamw}`, `model: DIR` means
  `model: {name_or_path: DIR}`, `data: a.jsonl` means `data: {sources: [a.jsonl]}`. Entries of
  `checkpoint`, `callbacks` and `model.transforms` may be plain names.
- **`${env:NAME}`** is replaced by the environment variable, `${env:NAME:-default}` by the default
  where it is unset; without one that is an error. A variable whose name holds TOKEN, KEY, SECRET or
  PASSWORD is never printed.

## On the command line

`fasttrain run FILE key.path=value …` The value is YAML and replaces what stands at the key:
`data.sources=[my.jsonl]`, `callbacks.0.patience=5`, `model={type: random, config: {…}}`. Where the
schema wants text, `model.revision=1234` is text.

## `extends`

`extends: base.yaml` reads that file first. Mappings are merged key by key; lists and single values
are replaced. A section that names another `type` than its base is replaced as a whole, since its
options mean another component. `imports` add up.

## Components of your own

`imports: [my_pkg.my_module, ./my_code.py]` runs modules and files that register components:

```python
from fasttrain.config.registry import OPTIMIZERS
from fasttrain.config.schema.optimizer import OptimizerSection
from fasttrain.core.interfaces import OptimizerFactory


class MyConfig(OptimizerSection):
    momentum: float = 0.9
    \"\"\"Its help text.\"\"\"


@OPTIMIZERS.register("mine")
class MyFactory(OptimizerFactory):
    Config = MyConfig
    ...
```

`type: mine` then chooses it. `type: my_pkg.my_module:MyFactory` does without registering.
Files are loaded by path; nothing is added to `sys.path`. `fasttrain schema FILE` prints the JSON
Schema with the types that FILE's imports register.

## In an editor

A first line `# yaml-language-server: $schema=PATH/configs/schema.json` gives completion and help in
editors with the YAML language server.
"""


# --- the page ------------------------------------------------------------------------------------


def config_page() -> str:
    """docs/config.md"""
    schema = config_schema()
    parts = [GENERATED, "", INTRODUCTION, "## Top level", "", *_table(schema, {"model", "data"})]
    for key in TrainConfig.model_fields:
        parts += _section(key, schema)
    parts += _alias_table()
    parts += _free_keys()
    return "\n".join(parts).rstrip() + "\n"


def _section(key: str, schema: dict[str, Any]) -> list[str]:
    """The part of the page about one top-level key that holds a section."""
    if key in PLAIN_SECTIONS:
        definition = schema["$defs"][PLAIN_SECTIONS[key]]
        return ["", f"## `{key}`", "", definition["description"], "", *_table(definition)]
    kind = COMPONENTS.get(key) or COMPONENT_LISTS.get(("", key))
    if kind is None:
        return []
    lines = ["", f"## `{key}`", "", *_types(kind, schema)]
    for (section, inner), entries in COMPONENT_LISTS.items():
        if section == key and inner != "eval_sources":
            lines += ["", f"### Entries of `{key}.{inner}`", "", *_types(entries, schema)]
    if key == "data":
        lines += ["", "### `columns` of a source", "", *_table(schema["$defs"]["Columns"])]
    if key == "optimizer":
        table = _table(schema["$defs"]["ParameterRule"], {"match"})
        lines += ["", "### Entries of `optimizer.rules`", "", *table]
    return lines


def _types(kind: Registry, schema: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for name in kind.names():
        definition = schema["$defs"].get(f"{kind.kind}.{name}")
        if definition is None:
            continue
        default = " (default)" if DEFAULT_TYPES.get(kind.kind) == name else ""
        lines += [f"**`type: {name}`**{default} — {definition['description']}", ""]
        if len(definition["properties"]) > 1:
            fields = kind.config(name).model_fields
            needed = {key for key, field in fields.items() if field.is_required()}
            lines += [*_table(definition, needed), ""]
    return lines[:-1]


def _table(definition: dict[str, Any], needed: Collection[str] = ()) -> list[str]:
    """A row per key: value, default, help."""
    lines = ["| key | value | default | |", "|---|---|---|---|"]
    for name, field in definition["properties"].items():
        if "const" in field:
            continue
        default = "required" if name in needed else _default(field)
        help_text = field.get("description", "").replace("|", "\\|")
        lines.append(f"| `{name}` | {_value(field)} | {default} | {help_text} |")
    return lines


def _default(field: dict[str, Any]) -> str:
    if "default" not in field or field["default"] is None:
        return ""
    return f"`{json.dumps(field['default'])}`".replace('"', "")


_WORDS = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true, false",
    "object": "mapping",
    "array": "list",
}


def _value(field: dict[str, Any]) -> str:
    """What may stand there, in words."""
    if "anyOf" in field:
        words = [_value(part) for part in field["anyOf"]]
        return ", ".join(dict.fromkeys(word for word in words if word))
    if "allOf" in field or "$ref" in field:
        name = field.get("$ref", "").rpartition("/")[2]
        return "" if name in ("environment", "human_number") else "mapping"
    if "enum" in field:
        return ", ".join(f"`{choice}`" for choice in field["enum"])
    if field.get("type") == "array":
        inner = _value(field["items"])
        return f"list of {inner}" if inner in _WORDS.values() else "list"
    return _WORDS.get(field.get("type", ""), "") + _limits(field)


def _limits(field: dict[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    shown = {name: field[name] for name in signs if field.get(name, MAX_INT) != MAX_INT}
    limits = [f"{signs[name]} {limit:g}" for name, limit in shown.items()]
    return " " + ", ".join(limits) if limits else ""


def _alias_table() -> list[str]:
    """Aliases by the key they are read as."""
    names: dict[str, list[str]] = {}
    for alias, key in ALIASES.items():
        names.setdefault(key, []).append(f"`{alias}`")
    return [
        "",
        "## Names of other trainers",
        "",
        "Read, and reported, as the key beside them. Beside that key itself, an alias is an error.",
        "",
        "| key | read for it |",
        "|---|---|",
        *(f"| `{key}` | {', '.join(aliases)} |" for key, aliases in names.items()),
    ]


def _free_keys() -> list[str]:
    keys = ", ".join(f"`{key}`" for key in FREE_TO_CHANGE)
    return [
        "",
        "## What may change before a run goes on",
        "",
        "An unfinished run goes on only with the config it was started with. What does not change "
        f"what is learnt may differ: {keys}, and callbacks that only look.",
    ]


# --- the hooks of callbacks ----------------------------------------------------------------------

HOOKS_BEGIN = "<!-- From here on written by docs/generate.py from fasttrain/core/events.py. -->"
HOOKS_END = "<!-- Up to here. -->"

# Events where the record is None, or an object that no class of events.py describes.
UNTYPED_RECORDS = {"on_tokenizer_created": "the tokenizer"}
RECORDS = (
    events.StepStart,
    events.StepEnd,
    events.LogRecord,
    events.EvaluationRecord,
    events.CheckpointRecord,
    events.Resumed,
    events.Result,
)
# What `call` takes, and so what stands after it in the wrapper's own signature.
WRAPPED_ARGUMENTS = {
    "load_source": "",
    "create_tokenizer": "",
    "tokenize": "rows, tokenizer",
    "create_model": "",
    "select_kernels": "model, profile",
    "create_optimizer": "",
    "create_scheduler": "",
    "loss": "model, batch",
    "backward": "loss",
    "optimizer_step": "skip",
    "evaluate": "",
    "save_checkpoint": "run",
}
UNTYPED_RESULTS = {
    "load_source": "`datasets.Dataset`",
    "create_tokenizer": "a transformers tokenizer",
    "backward": "nothing",
    "optimizer_step": "nothing",
}


def callbacks_page() -> str:
    """docs/callbacks.md, written by hand but for the part between the two marks."""
    page = (ROOT / "docs/callbacks.md").read_text(encoding="utf-8")
    before, _, rest = page.partition(HOOKS_BEGIN)
    after = rest.partition(HOOKS_END)[2]
    return f"{before}{HOOKS_BEGIN}\n\n{hooks()}\n\n{HOOKS_END}{after}"


def hooks() -> str:
    """Order of a run, observers with their records, wrappers with their arguments."""
    description = (events.__doc__ or "").split("\n\n", 1)[1]
    order = description[: description.index("\n\nAn observer")]
    lines = ["### In the order of a run", "", "```", dedent(order), "```"]
    lines += ["", "### Observers", "", "| method | record |", "|---|---|"]
    for name in events.OBSERVERS:
        kind = inspect.signature(getattr(events.Callback, name)).parameters["record"].annotation
        record = UNTYPED_RECORDS.get(name) or ("" if kind == "None" else f"`{kind}`")
        lines.append(f"| `{name}` | {record} |")
    lines += ["", "### Wrappers", "", "| method | called as | returns |", "|---|---|---|"]
    for name, result in events.WRAPPABLE.items():
        returned = UNTYPED_RESULTS.get(name) or f"`{getattr(result, '__name__', result)}`"
        lines.append(f"| `wrap_{name}` | `call({WRAPPED_ARGUMENTS[name]})` | {returned} |")
    lines += ["", "### Records", "", "```python"]
    lines += ["\n\n\n".join(inspect.getsource(record).rstrip() for record in RECORDS), "```"]
    return "\n".join(lines)


# --- all that is generated -----------------------------------------------------------------------


def schema_file() -> str:
    """configs/schema.json"""
    return json.dumps(config_schema(), indent=2, ensure_ascii=False) + "\n"


GENERATED_FILES: dict[str, Callable[[], str]] = {
    "docs/config.md": config_page,
    "docs/callbacks.md": callbacks_page,
    "configs/schema.json": schema_file,
}


def stale_files() -> list[str]:
    """The generated files that differ from what the code says, or are missing."""
    return [
        name
        for name, make in GENERATED_FILES.items()
        if not (ROOT / name).exists() or (ROOT / name).read_text(encoding="utf-8") != make()
    ]


def main(arguments: list[str]) -> int:
    """Write the files, or with --check only name the stale ones."""
    stale = stale_files()
    if "--check" in arguments:
        for name in stale:
            print(f"{name} is stale: run python docs/generate.py")
        return 1 if stale else 0
    for name in stale:
        (ROOT / name).write_text(GENERATED_FILES[name](), encoding="utf-8")
        print(f"wrote {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
