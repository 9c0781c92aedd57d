"""The lines of a running run, as pure functions of their records."""

from __future__ import annotations

from fasttrain.callbacks.human import count, duration, size
from fasttrain.core.events import CheckpointRecord, EvaluationRecord, LogRecord, Resumed

# What a narrow terminal does without, the first first.
SPARED = ("peak", "lr", "gnorm", "extras", "speed")


def progress_line(
    record: LogRecord,
    *,
    step: int,
    total_steps: int,
    eta_seconds: float | None,
    width: int | None = None,
) -> str:
    """`step 120/4000 · loss 1.234 · …`, in `width` characters as far as parts can be spared.
    `step` may have moved on since `record`."""
    supervised_rate = record.tokens_per_second * record.supervised_tokens / max(record.tokens, 1)
    parts = {
        "step": f"step {step}/{total_steps}",
        "loss": f"loss {record.loss:.3f}",
        "extras": " · ".join(f"{name} {value:.3g}" for name, value in record.extras.items()),
        "gnorm": f"gnorm {record.grad_norm:.2f}",
        "lr": f"lr {record.lr:.2e}",
        "speed": f"{count(record.tokens_per_second)} tok/s ({count(supervised_rate)} supervised)",
        "peak": f"peak {size(record.peak_memory_bytes)}",
        "skipped": f"skipped {record.skipped_steps}" if record.skipped_steps else "",
        "eta": "" if eta_seconds is None else f"ETA {duration(eta_seconds)}",
    }
    for spared in SPARED:
        if width is None or len(_joined(parts)) <= width:
            break
        parts[spared] = ""
    return _joined(parts)


def _joined(parts: dict[str, str]) -> str:
    return " · ".join(filter(None, parts.values()))


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
