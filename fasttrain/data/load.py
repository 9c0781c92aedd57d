"""Sources → rows in one form: read, detected, checked, drawn, and some held out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from datasets import Dataset, concatenate_datasets

from fasttrain.config.errors import Problem, UserError
from fasttrain.config.registry import SOURCES
from fasttrain.config.schema.data import DataSection, SourceSection
from fasttrain.core.data_report import SourceReport
from fasttrain.core.events import Hooks
from fasttrain.core.interfaces import Examples, LoadedData
from fasttrain.data.conversation import Conversation
from fasttrain.data.draw import draw_rows, hold_out
from fasttrain.data.normalise import LoadedSource, normalise


@dataclass
class Rows(LoadedData):
    """Rows that are read and understood, not yet tokenised.

    Columns of both datasets, all text: `kind` ("conversation" or "text"), `messages` (JSON of a
    list of messages, "" for text), `text` ("" for conversations), `source`, `group` ("" where a row
    belongs to none), `origin` (such as "train.jsonl:17").
    """

    train: Dataset
    evaluation: Dataset | None
    reports: tuple[SourceReport, ...]
    has_conversations: bool = False  # whether any row needs a chat template

    def texts(self) -> Iterator[str]:
        """The training text, one piece per message or document."""
        for batch in self.train.select_columns(["kind", "messages", "text"]).iter(1000):
            for kind, messages, text in zip(
                batch["kind"], batch["messages"], batch["text"], strict=True
            ):
                if kind == "text":
                    yield text
                else:
                    for message in Conversation.from_json(messages).messages:
                        yield from filter(None, (message.reasoning, message.content))


def load_rows(section: DataSection, *, examples: Examples, seed: int, hooks: Hooks) -> Rows:
    """Read every source through the hook `load_source`, and turn its rows into one form.

    All is done before any model is built. UserError where a source cannot be read, its format is
    not clear, a row is malformed (unless `invalid: drop`), or one side of the split would be empty.
    """
    if section.eval_split and section.eval_sources:
        raise UserError(Problem("excludes eval_sources; give one.", key="data.eval_split"))
    train = _load(section.sources, "data.sources", hooks)
    held_out = _load(section.eval_sources, "data.eval_sources", hooks)
    _name_apart([*train, *held_out])
    draw_rows(train, total=section.max_samples, seed=seed)
    draw_rows(held_out, total=None, seed=seed)
    ready = [normalise(source, section, examples) for source in (*train, *held_out)]
    reports = tuple(each.report for each in ready)
    conversations = any(len(each.rows) and each.kind == "conversation" for each in ready)
    rows = concatenate_datasets([each.rows for each in ready[: len(train)]])
    if held_out:
        evaluation = concatenate_datasets([each.rows for each in ready[len(train) :]])
        return Rows(rows, evaluation, reports, conversations)
    if section.eval_split:
        return Rows(*hold_out(rows, section.eval_split, seed), reports, conversations)
    return Rows(rows, None, reports, conversations)


def _load(sections: tuple[SourceSection, ...], key: str, hooks: Hooks) -> list[LoadedSource]:
    loaded = []
    for index, section in enumerate(sections):
        source = SOURCES.component(section.type)(section)
        rows = hooks.call("load_source", source.load)
        name = section.name or _derived_name(section)
        if not isinstance(rows, Dataset):
            raise TypeError(
                f"source '{name}': load() returned {type(rows).__name__}; it must return a "
                f"datasets.Dataset."
            )
        if len(rows) == 0:
            raise UserError(Problem(f"source '{name}' has no rows.", key=f"{key}[{index}]"))
        loaded.append(LoadedSource(name, f"{key}[{index}]", section, rows, source.note))
    return loaded


def _derived_name(section: SourceSection) -> str:
    """A path or a name as the config writes it; else the type."""
    for field in ("path", "name_or_path"):
        value = getattr(section, field, None)
        if isinstance(value, str):
            return value
    return section.type


def _name_apart(sources: list[LoadedSource]) -> None:
    """Two sources of one name are numbered."""
    seen: dict[str, int] = {}
    for source in sources:
        seen[source.name] = seen.get(source.name, 0) + 1
        if seen[source.name] > 1:
            source.name = f"{source.name} ({seen[source.name]})"
