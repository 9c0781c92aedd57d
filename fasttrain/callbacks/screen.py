"""The first screen as lines of text: pure functions of what the blocks reported.

Each section is a label and its lines. Without colour the text says the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.text import Text
from torch import nn

from fasttrain.callbacks.human import count, plural, shorten
from fasttrain.core.data_report import DataReport, DecodedSample, SourceReport
from fasttrain.core.interfaces import LanguageModel
from fasttrain.core.kernel_plan import EAGER, OPTIMIZER, KernelPlan, KernelRow
from fasttrain.runtime.log import escape_controls

LABEL_WIDTH = 11
MAX_SOURCES = 4
MAX_GROUPS = 12  # of parameters; layer_decay makes two for each layer
MAX_PIECES = 6
PIECE_WIDTH = 150
NAME_WIDTH = 60  # of a parameter group, which holds globs
REASON_WIDTH = 100


def section(label: str, lines: Iterable[str | Text]) -> list[Text]:
    """Lines beside a label that stands on the first of them."""
    shown = []
    for number, line in enumerate(lines):
        head = (label if number == 0 else "").ljust(LABEL_WIDTH)
        body = line if isinstance(line, Text) else Text(escape_controls(line))
        shown.append(Text.assemble((head, "bold cyan"), body))
    return shown


# --------------------------------------------------------------------------------------------- data


def data_section(report: DataReport) -> list[Text]:
    """What was read, what came of it, and how it is laid into packs."""
    lines = [source_line(source) for source in report.sources[:MAX_SOURCES]]
    rest = report.sources[MAX_SOURCES:]
    if rest:
        used, rows = sum(s.used for s in rest), sum(s.rows for s in rest)
        lines.append(
            f"and {plural(len(rest), 'more source')}: {used:,} of {plural(rows, 'row')} used"
        )
    lines.append(_training_line(report))
    if report.eval_documents:
        lines.append(
            f"held out: {plural(report.eval_documents, 'document')} · {count(report.eval_tokens)} "
            f"tokens, {count(report.eval_supervised_tokens)} supervised"
        )
    lines.append(
        f"max_length {report.max_length} ({report.max_length_reason}) · longest document "
        f"{report.longest_document} · cache {report.cache}"
    )
    return section("data", lines)


def source_line(source: SourceReport) -> str:
    """One source: how it was understood and what was left out."""
    parts = [f"{source.used:,} of {plural(source.rows, 'row')} used"]
    if source.dropped:
        reasons = ", ".join(f"{rows:,} {reason}" for reason, rows in source.dropped.items())
        parts.append(f"{sum(source.dropped.values()):,} dropped ({reasons})")
    if source.truncated:
        parts.append(f"{source.truncated:,} truncated")
    if source.split:
        parts.append(f"{source.split:,} long texts split")
    return f"{source.name}: {source.detected} · {' · '.join(parts)}"


def _training_line(report: DataReport) -> str:
    share = report.supervised_tokens / max(report.tokens, 1)
    return (
        f"{plural(report.documents, 'document')} · {count(report.tokens)} tokens, {share:.1%} "
        f"supervised · {plural(report.packs, 'pack')}, {report.waste:.1%} empty"
    )


def sample_section(sample: DecodedSample, *, colour: bool) -> list[Text]:
    """One document as the model sees it, a line for each piece; the supervised ones stand out."""
    legend = Text(f"{escape_controls(sample.source)}, ")
    legend.append(*_marked("supervised", colour=colour))
    lines = [legend]
    for text, supervised in sample.pieces[:MAX_PIECES]:
        shown = escape_controls(shorten(text, PIECE_WIDTH))
        lines.append(Text(*_marked(shown, colour=colour)) if supervised else Text(shown))
    if len(sample.pieces) > MAX_PIECES:
        lines.append(Text(f"… {plural(len(sample.pieces) - MAX_PIECES, 'more piece')}"))
    return section("sample", lines)


def _marked(text: str, *, colour: bool) -> tuple[str, str]:
    return (text, "black on green") if colour else (f"»{text}«", "")


# ------------------------------------------------------------------------------ model and optimizer


def model_section(model: LanguageModel) -> list[Text]:
    """Architecture and size."""
    total, trainable = parameter_counts(model)
    share = (
        "all trainable"
        if trainable == total
        else (f"{count(trainable)} trainable ({trainable / max(total, 1):.2%})")
    )
    return section("model", [model.describe(), f"{count(total)} parameters, {share}"])


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters, a tied one counted once."""
    parameters = list(model.parameters())
    return (
        sum(parameter.numel() for parameter in parameters),
        sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
    )


def optimizer_section(optimizer: Any) -> list[Text]:
    """A line for each parameter group; the first one's learning rate is the logged one."""
    lines = [
        f"{type(optimizer).__name__} · {_group_line(group, number)}"
        for number, group in enumerate(optimizer.param_groups[:MAX_GROUPS])
    ]
    if rest := optimizer.param_groups[MAX_GROUPS:]:
        parameters = sum(p.numel() for group in rest for p in group["params"])
        rates = sorted(_peak(group) for group in rest)
        lines.append(
            f"and {plural(len(rest), 'more group')}: {count(parameters)} parameters · "
            f"peak lr {rates[0]:g} to {rates[-1]:g}"
        )
    return section("optimizer", lines)


def _peak(group: dict[str, Any]) -> float:
    return float(group.get("initial_lr", group["lr"]))


def _group_line(group: dict[str, Any], number: int) -> str:
    parameters = group["params"]
    size = count(sum(parameter.numel() for parameter in parameters))
    return (
        f"{shorten(group.get('name', f'group {number}'), NAME_WIDTH)}: {size} parameters in "
        f"{plural(len(parameters), 'tensor')} · weight decay {group.get('weight_decay', 0):g} · "
        f"peak lr {_peak(group):g}"
    )


# ------------------------------------------------------------------------------------------ kernels


def kernel_section(plan: KernelPlan) -> list[Text]:
    """The table of decisions: what serves each op, and why."""
    if not plan.rows:
        return section("kernels", ["none selected: the model runs as its authors wrote it"])
    timed = any(row.milliseconds is not None for row in plan.rows)
    headings = ("op", "sites", "chosen", "why", "parity", *((TIMED,) if timed else ()), "rejected")
    lines = table(headings, [kernel_cells(row, timed=timed) for row in plan.rows])
    return section("kernels", [*lines, *_other_paths(plan)])


TIMED = "ms (eager)"  # a column that is there where anything was timed
# What generation does by itself: attention that keeps a cache, and logits of the last position.
NOT_IN_GENERATION = ("packed_attention", "linear_cross_entropy")


def _other_paths(plan: KernelPlan) -> list[str]:
    """What evaluation and generation run on."""
    served = dict.fromkeys(
        site.op for site in plan.sites if site.backend != EAGER and site.path != OPTIMIZER
    )
    kept = ", ".join(op for op in served if op not in NOT_IN_GENERATION) or "no kernel"
    if not served:
        return ["evaluation and generation: the model as its authors wrote it, too"]
    return [
        "evaluation: the same kernels",
        f"generation: {kept}; attention and logits are transformers' own",
    ]


def kernel_cells(row: KernelRow, *, timed: bool) -> tuple[str, ...]:
    """One row of the kernel table."""
    names: dict[str, list[str]] = {}
    for name, reason in row.rejected:
        names.setdefault(reason, []).append(name)
    rejected = (f"{', '.join(of)}: {shorten(why, REASON_WIDTH)}" for why, of in names.items())
    times = f"{_ms(row.milliseconds)} ({_ms(row.eager_milliseconds)})"
    return (
        row.op,
        f"{row.sites_matched} of {row.sites_found}",
        row.chosen,
        shorten(row.reason, REASON_WIDTH),
        "—" if row.parity is None else f"{row.parity:.2f}",
        *((times,) if timed else ()),
        "; ".join(rejected) or "—",
    )


def _ms(value: float | None) -> str:
    return "—" if value is None else f"{value:.3g}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns in line; the last may be as long as it likes."""
    cells = [tuple(headings), *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings) - 1)]
    return [
        "  ".join(
            [*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]
        ).rstrip()
        for row in cells
    ]


# --------------------------------------------------------------------------------------------- plan


def plan_section(notes: Sequence[tuple[str, str]]) -> list[Text]:
    """Every choice that was made for the user, with its reason."""
    if not notes:
        return []
    width = max(len(what) for what, _ in notes) + 2
    return section("plan", [f"{what.ljust(width)}{choice}" for what, choice in notes])
