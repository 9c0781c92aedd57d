"""What a run came to: the last lines that the user sees."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from fasttrain.callbacks.human import count, duration
from fasttrain.callbacks.screen import section
from fasttrain.core.events import Result

if TYPE_CHECKING:
    from fasttrain.core.run import Run


@dataclass
class Seen:
    """What the summary needs of the records that passed by."""

    first_held_out: tuple[int, float] | None = None  # step, nats per supervised token
    saved: dict[str, Path] = field(default_factory=dict)  # kind → the last one written


def summary_section(run: Run, result: Result, seen: Seen, seconds: float) -> list[Text]:
    """How the run ended, what it reached, where things are, and the next commands."""
    if run.dry_run:
        return section("done", [result.reason])
    return [
        *section("done" if result.finished else "stopped", [_ending(run, result, seconds)]),
        *section("loss", _losses(run, result, seen)),
        *[line for label, text in run.summary.items() for line in section(label, [text])],
        *section("files", _files(run.directory, seen.saved.values())),
        *section("next", _next_commands(run, result)),
    ]


def _ending(run: Run, result: Result, seconds: float) -> str:
    return (
        f"step {result.step} of {run.total_steps}: {result.reason} · "
        f"{count(run.tokens)} tokens ({count(run.supervised_tokens)} supervised) · "
        f"{duration(seconds)}"
    )


def _losses(run: Run, result: Result, seen: Seen) -> list[str]:
    lines = [] if result.loss is None else [f"training {result.loss:.3f} (last logged interval)"]
    if result.eval_loss is not None and run.best_eval_loss is not None:
        first = (
            ""
            if seen.first_held_out is None
            else (f"first {seen.first_held_out[1]:.3f} (step {seen.first_held_out[0]}) → ")
        )
        lines.append(
            f"held out {first}best {run.best_eval_loss:.3f} (step {run.best_step}) → "
            f"last {result.eval_loss:.3f}"
        )
    return lines


def _files(directory: Path, saved: Iterable[Path]) -> list[str]:
    listed = [*saved, directory / "metrics.jsonl", directory / "loss.png"]
    return [" · ".join(str(path) for path in dict.fromkeys(listed) if path.exists()) or "none"]


def _next_commands(run: Run, result: Result) -> list[str]:
    commands = []
    if (run.directory / "model").is_dir():
        commands.append(f'fasttrain generate {shlex.quote(str(run.directory))} "your prompt"')
    if not result.finished:
        commands.append(
            f"the same command again goes on at step {result.step + 1}"
            if (run.directory / "checkpoints").is_dir()
            else "nothing was saved to go on from: `checkpoint:` has no `sharded` entry"
        )
    return commands
