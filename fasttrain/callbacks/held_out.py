"""For callbacks that look at held-out data."""

from __future__ import annotations

from fasttrain.config.errors import Problem, UserError
from fasttrain.core.data_report import DataReport


def require_held_out(report: DataReport, callback: str) -> None:
    """UserError where there are no held-out data for `callback` to look at."""
    if report.eval_documents == 0:
        raise UserError(
            Problem(
                key=f"callbacks: {callback}",
                what="there are no held-out data for it to look at.",
                hint="Set data.eval_split (0.05, say) or data.eval_sources.",
            )
        )
