"""The lines of a running run, as pure functions of their records."""

from __future__ import annotations

from fasttrain.callbacks.human import count, duration, size
from fasttrain.core.events import CheckpointRecord, EvaluationRecord, LogRecord, Resumed


def progress_line(
    record: LogRecord, *, step: int, total_steps: int, eta_seconds: float | None
) -> str:
    """`step 120/4000 · loss 1.234 · …`. `step` may have moved on since `record`."""
    supervised_rate = record.tokens_per_second * record.supervised_tokens / max(record.tokens, 1)
    parts = [
        f"step {step}/{total_steps}",
        f"loss {record.loss:.3f}",
        *(f"{name} {value:.3g}" for name, value in record.extras.items()),
        f"gnorm {record.grad_norm:.2f}",
        f"lr {record.lr:.2e}",
        f"{count(record.tokens_per_second)} tok/s ({count(supervised_rate)} supervised)",
        f"peak {size(record.peak_memory_bytes)}",
    ]
    if record.skipped_steps:
        parts.append(f"skipped {record.skipped_steps}")
    if eta_seconds is not None:
        parts.append(f"ETA {duration(eta_seconds)}")
    return " · ".join(parts)


def evaluation_line(record: EvaluationRecord) -> str:
    """One evaluation."""
    best = " (best so far)" if record.is_best else ""
    return (
        f"step {record.step} · held-out loss {record.loss:.3f}{best} · "
        f"{count(record.supervised_tokens)} supervised tokens · {duration(record.seconds)}"
    )


def checkpoint_line(record: CheckpointRecord) -> str:
    """One save."""
    return f"step {record.step} · saved {record.path} ({record.kind}) · {duration(record.seconds)}"


def resumed_lines(record: Resumed) -> list[str]:
    """Where the run goes on, and what was passed over to get there."""
    skipped = [f"passed over {reason}" for reason in record.skipped]
    return [*skipped, f"resumed at step {record.step} from {record.path}"]
