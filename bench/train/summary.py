"""From the rounds' measurements to medians, ratios and a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

# Of every contender: median, least and most over the rounds.
FIGURES = (
    "tokens_per_second",
    "supervised_tokens_per_second",
    "tokens_per_cpu_second",
    "step_seconds_p50",
    "padding",
    "peak_rss_bytes",
    "cuda_peak_allocated_bytes",
    "cuda_peak_reserved_bytes",
    "first_loss",
    "final_loss",
)
OURS = "fasttrain"


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Median, minimum and maximum of each figure that the runs have."""
    summary = {}
    for figure in FIGURES:
        values = [run[figure] for run in runs if figure in run]
        if values:
            summary[figure] = {
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
            }
    return summary


def memory_figure(summary: Mapping[str, Any]) -> str:
    """The memory that is scarce: the GPU's where there is one."""
    cuda = "cuda_peak_reserved_bytes"
    return cuda if cuda in summary else "peak_rss_bytes"


def ratios(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """How many times as fast as each other fasttrain is, and how much more memory they take."""
    if OURS not in summaries:
        return {}
    ours = summaries[OURS]
    memory = memory_figure(ours)
    return {
        name: {
            "speed": ours["tokens_per_second"]["median"] / other["tokens_per_second"]["median"],
            "memory": other[memory]["median"] / ours[memory]["median"],
        }
        for name, other in summaries.items()
        if name != OURS
    }


HEADINGS = (
    "",
    "tokens/s",
    "min–max",
    "supervised/s",
    "padding",
    "step p50",
    "peak memory",
    "fasttrain is",
    "memory",
)


def table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """The summaries as text, one contender a line."""
    compared = ratios(summaries)
    rows = [HEADINGS]
    for name, summary in summaries.items():
        speed, ratio = summary["tokens_per_second"], compared.get(name)
        rows.append(
            (
                name,
                f"{speed['median']:,.0f}",
                f"{speed['min']:,.0f}–{speed['max']:,.0f}",
                f"{summary['supervised_tokens_per_second']['median']:,.0f}",
                f"{summary['padding']['median']:.0%}",
                f"{summary['step_seconds_p50']['median']:.3f} s",
                f"{summary[memory_figure(summary)]['median'] / 2**30:.2f} GiB",
                f"{ratio['speed']:.2f}x as fast" if ratio else "",
                f"{ratio['memory']:.2f}x ours" if ratio else "",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
