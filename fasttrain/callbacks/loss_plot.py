"""loss.png, drawn from metrics.jsonl."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttrain.config.schema.callback import LossPlotConfig
from fasttrain.core.events import Callback, Result
from fasttrain.runtime.files import write_atomically

if TYPE_CHECKING:
    from fasttrain.core.run import Run

Curve = tuple[list[int], list[float]]  # steps, losses


class LossPlot(Callback):
    """Draws the training and the held-out loss when training ends, whatever ended it."""

    Config = LossPlotConfig

    def on_run_end(self, run: Run, record: Result) -> None:
        metrics = run.directory / "metrics.jsonl"
        if run.engine.topology.rank == 0 and run.steps_this_process and metrics.exists():
            draw_loss(metrics, run.directory / "loss.png")


def draw_loss(metrics: Path, picture: Path) -> bool:
    """Draw the curves of a metrics file; False where it holds nothing to draw."""
    train, held_out = read_curves(metrics)
    if not train[0] and not held_out[0]:
        return False
    # Without pyplot: no backend is chosen for the rest of the process, and nothing stays in memory.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*train, label="training", linewidth=1.2)
    if held_out[0]:
        axes.plot(*held_out, label="held out", marker="o", markersize=4)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per supervised token)")
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    write_atomically(picture, image.getvalue())
    return True


def read_curves(metrics: Path) -> tuple[Curve, Curve]:
    """The training and the held-out curve. Lines that cannot be read (a crash cut them) and losses
    that were not finite are left out."""
    train: Curve = ([], [])
    held_out: Curve = ([], [])
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        values = _parsed(line)
        for curve, key in ((train, "loss"), (held_out, "eval_loss")):
            if isinstance(values.get(key), (int, float)) and isinstance(values.get("step"), int):
                curve[0].append(values["step"])
                curve[1].append(values[key])
    return train, held_out


def _parsed(line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
