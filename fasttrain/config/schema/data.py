"""`data:` and its sources."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fasttrain.config.schema.base import (
    ComponentSection,
    Fraction,
    LocalPath,
    PositiveInt,
    Section,
)


class Columns(Section):
    """Which columns hold what, where detection needs help. Give only those that apply."""

    messages: str | None = None
    """List of messages with `role`/`content` (or ShareGPT's `from`/`value`)."""
    system: str | None = None
    """System prompt."""
    prompt: str | None = None
    """What is asked."""
    input: str | None = None
    """Further input, put below the prompt (alpaca's `input`)."""
    response: str | None = None
    """What is answered: the supervised part."""
    text: str | None = None
    """Plain text: every token is supervised."""


class SourceSection(ComponentSection):
    """What every source has."""

    name: str | None = None
    """How the source is called in reports. Default: derived from its path or name."""
    max_samples: PositiveInt | None = None
    """Use at most this many rows, drawn with the run's seed."""
    columns: Columns | None = None
    """Column mapping; what it leaves out is detected, and the detection is printed."""


class FileSourceConfig(SourceSection):
    """Local files: .jsonl, .json (a list of rows), .parquet, .csv, .txt, optionally .gz."""

    type: Literal["file"] = "file"
    path: LocalPath
    """A file, a directory of such files, or a glob."""


class HuggingFaceSourceConfig(SourceSection):
    """A dataset from the hub, or a directory written by datasets' `save_to_disk`."""

    type: Literal["huggingface"] = "huggingface"
    name_or_path: LocalPath
    """Name on the hub, or directory."""
    config_name: str | None = None
    """The dataset's configuration (subset)."""
    split: str = "train"
    """Which split is read."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""


class PythonStdlibSourceConfig(SourceSection):
    """Instruction pairs made from the running Python's standard library: a function's signature is
    asked, what its docstring says is answered. Downloads nothing."""

    type: Literal["python_stdlib"] = "python_stdlib"


def _sources_as_tuple(value: Any) -> Any:
    if isinstance(value, (str, dict)):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


class DataSection(ComponentSection):
    """What the run learns from."""

    type: Literal["packed"] = "packed"
    sources: Annotated[tuple[SourceSection, ...], BeforeValidator(_sources_as_tuple)] = Field(
        min_length=1
    )
    """Paths, hub names or mappings with a `type`. A string that names an existing path is a file
    source; one that names a registered source is that source; else it is a dataset on the hub."""
    eval_sources: Annotated[tuple[SourceSection, ...], BeforeValidator(_sources_as_tuple)] = ()
    """Sources held out for evaluation. Excludes `eval_split`."""
    eval_split: Fraction = 0.0
    """Share of the rows held out for evaluation, drawn with the run's seed. Rows that belong
    together (a source may group them: one module, one conversation tree) are held out together."""
    max_samples: PositiveInt | None = None
    """Use at most this many rows in all, drawn with the run's seed."""
    max_length: PositiveInt | None = None
    """Tokens of a pack, and of the longest document. Default: the model's limit, at most 8192."""
    packing: bool = True
    """Fill each row of a batch with whole documents up to max_length, best fit first. Without it a
    row is one document."""
    pack_window: PositiveInt = 65536
    """Documents that are packed together: more pack tighter, fewer shuffle better."""
    overlong: Literal["split", "truncate", "drop", "error"] = "split"
    """What happens to a document longer than max_length. `split` cuts a plain text into several
    documents and keeps a chat's head, `truncate` keeps the head of either; a document that is left
    with nothing to learn is dropped and counted."""
    invalid: Literal["error", "drop"] = "error"
    """What happens to a row that is malformed or empty. Dropped rows are counted and shown."""
    train_on_prompts: bool = False
    """Supervise the prompts as well as the answers."""
    num_workers: PositiveInt | None = None
    """Processes that tokenise. Default: the machine's cores, at most 16."""
    cache_dir: LocalPath | None = None
    """Where tokenised data are kept. Default: `$FASTTRAIN_CACHE`, else `~/.cache/fasttrain`."""
