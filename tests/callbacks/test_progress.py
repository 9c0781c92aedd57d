"""The lines of a running run."""

from pathlib import Path

import pytest
from fake_run import evaluation, log_record

from fasttrain.callbacks.progress import (
    checkpoint_line,
    evaluation_line,
    progress_line,
    resumed_lines,
)
from fasttrain.core.events import CheckpointRecord, Resumed

WHOLE = (
    "step 125/4000 · loss 1.234 · gnorm 0.81 · lr 1.90e-05 · 41.2k tok/s (37.1k supervised) · "
    "peak 1.4 GiB · ETA 1h12m"
)


def line(record, **changes):
    options = {"step": 125, "total_steps": 4000, "eta_seconds": 4320.0, **changes}
    return progress_line(record, **options)


def test_the_whole_line():
    assert line(log_record()) == WHOLE


def test_extras_and_skipped_steps_are_shown_where_there_are_any():
    shown = line(log_record(extras={"accuracy": 0.51234}, skipped_steps=2), eta_seconds=None)
    assert " · loss 1.234 · accuracy 0.512 · gnorm" in shown
    assert shown.endswith(" · skipped 2")


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (len(WHOLE), WHOLE),
        (len(WHOLE) - 1, WHOLE.replace(" · peak 1.4 GiB", "")),
        (75, "step 125/4000 · loss 1.234 · 41.2k tok/s (37.1k supervised) · ETA 1h12m"),
        (10, "step 125/4000 · loss 1.234 · ETA 1h12m"),
    ],
)
def test_a_narrow_terminal_is_spared_the_least_important(width, shown):
    assert line(log_record(), width=width) == shown


def test_an_interval_without_tokens_divides_nothing_by_nothing():
    shown = line(
        log_record(tokens=0, supervised_tokens=0, tokens_per_second=0.0, loss=float("nan"))
    )
    assert "loss nan" in shown and "0 tok/s (0 supervised)" in shown


def test_evaluations_saves_and_resumes_are_one_line_each():
    assert evaluation_line(evaluation(200, 1.2345)) == (
        "step 200 · held-out loss 1.234 (best so far) · 24.0k supervised tokens · 3.1s"
    )
    assert "best" not in evaluation_line(evaluation(200, 1.2345, is_best=False))
    saved = CheckpointRecord(200, "sharded", Path("runs/x/checkpoints/step-00000200"), 12.3)
    assert checkpoint_line(saved) == (
        "step 200 · saved runs/x/checkpoints/step-00000200 (sharded) · 12s"
    )
    assert resumed_lines(Resumed(100, Path("a"), ("b: torn", "c: checksum"))) == [
        "passed over b: torn",
        "passed over c: checksum",
        "resumed at step 100 from a",
    ]
