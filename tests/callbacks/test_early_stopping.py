"""Patience."""

import pytest
from fake_run import evaluation, make_run, report

from fasttrain.callbacks.early_stopping import EarlyStopping
from fasttrain.config.errors import UserError
from fasttrain.config.schema.callback import EarlyStoppingConfig


def feed(callback, run, losses, first_step=1):
    for step, loss in enumerate(losses, first_step):
        callback.on_evaluation_end(run, evaluation(step, loss))


def test_it_stops_after_patience_evaluations_without_a_new_best_and_calls_the_run_finished(
    tmp_path,
):
    run = make_run(tmp_path)
    callback = EarlyStopping(EarlyStoppingConfig(patience=2, min_delta=0.1))
    feed(callback, run, [3.0, 2.0, 1.95])
    assert run.stop_reason is None
    feed(callback, run, [float("nan")], first_step=4)
    assert run.stop_reason == (
        "early stopping: 2 evaluations without a held-out loss below 2.000 (step 2)"
    )
    assert run.finished and run.exit_code == 0


def test_an_improvement_starts_the_count_anew(tmp_path):
    run = make_run(tmp_path)
    feed(EarlyStopping(EarlyStoppingConfig(patience=2)), run, [3.0, 3.0, 2.0, 2.0, 1.0, 1.0])
    assert run.stop_reason is None


def test_a_resumed_run_goes_on_counting(tmp_path):
    run = make_run(tmp_path)
    first = EarlyStopping(EarlyStoppingConfig(patience=2))
    feed(first, run, [2.0, 2.0])
    second = EarlyStopping(EarlyStoppingConfig(patience=2))
    second.load_state_dict(first.state_dict())
    feed(second, run, [2.0], first_step=2)  # the last step's evaluation, once more
    assert run.stop_reason is None
    feed(second, run, [2.0], first_step=3)
    assert "2 evaluations" in run.stop_reason


def test_a_fresh_state_is_json():
    assert EarlyStopping().state_dict()["best"] is None


def test_without_held_out_data_it_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"early_stopping: there are no held-out data.*eval_split"):
        EarlyStopping().on_data_ready(make_run(tmp_path), report(eval_documents=0))
