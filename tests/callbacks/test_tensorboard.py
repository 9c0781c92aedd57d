"""Scalars, as TensorBoard itself reads them."""

import importlib.util

import pytest
from fake_run import evaluation, log_record, make_run, result

from fasttrain.callbacks.tensorboard import TensorBoard
from fasttrain.config.errors import UserError


def scalars(directory, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(name)]


def test_losses_rates_and_extras_are_written(tmp_path):
    run, board = make_run(tmp_path), TensorBoard()
    board.on_log(run, log_record(10, extras={"accuracy": 0.25}))
    board.on_evaluation_end(run, evaluation(10, 2.5))
    board.on_run_end(run, result(tmp_path))
    assert scalars(tmp_path, "train/loss") == [(10, 1.2344)]
    assert scalars(tmp_path, "train/accuracy") == [(10, 0.25)]
    assert scalars(tmp_path, "eval/loss") == [(10, 2.5)]


def test_a_resumed_run_replaces_what_a_killed_process_wrote_beyond_it(tmp_path):
    run = make_run(tmp_path)
    for steps in ((10, 20, 30), (20, 30)):
        board = TensorBoard()
        for step in steps:
            board.on_log(run, log_record(step, loss=float(len(steps))))
        board.on_error(run, RuntimeError())
    assert scalars(tmp_path, "train/loss") == [(10, 3.0), (20, 2.0), (30, 2.0)]


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed\. Install the extra: .*\[tensorboard\]"):
        TensorBoard()


def test_nothing_is_written_before_the_first_record(tmp_path):
    board = TensorBoard()
    board.on_run_end(make_run(tmp_path), result(tmp_path))
    assert list(tmp_path.iterdir()) == []
