"""Losses and gradients that are not finite."""

import json
import logging

import pytest
from fake_run import log_record, make_run, result, step_end

from fasttrain.callbacks.nonfinite_guard import MAX_UNREAD, NonFiniteGuard
from fasttrain.config.schema.callback import NonFiniteGuardConfig

NAN = float("nan")


@pytest.fixture(autouse=True)
def info(caplog):
    caplog.set_level(logging.INFO, "fasttrain")


def test_by_default_the_run_stops_and_keeps_the_offending_batch(tmp_path, caplog):
    run, guard = make_run(tmp_path), NonFiniteGuard()
    guard.on_step_end(run, step_end(11))
    guard.on_step_end(run, step_end(12, loss=NAN, skipped=True))
    assert run.stop_reason is None, "flags are read when a step is logged, not before"
    guard.on_log(run, log_record(20, skipped_steps=1))
    assert run.stop_reason == "step 12: the loss is nan (nonfinite_guard, policy stop)"
    assert run.exit_code == 1 and not run.finished
    path = tmp_path / "nonfinite" / "step-00000012.json"
    assert f"the weights were not changed. Its batch is in {path}." in caplog.text
    kept = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert (kept["step"], kept["loss"], kept["grad_norm"]) == (12, "nan", "1.0")
    [[first, second]] = kept["micro_batches"]
    assert first == {
        "source": "toy", "text": "abc", "input_ids": [0, 1, 2], "labels": [1, 2, -100]
    }  # fmt: skip
    assert second["text"] == "de"


def test_a_gradient_norm_is_named_where_the_loss_was_fine(tmp_path):
    run, guard = make_run(tmp_path), NonFiniteGuard()
    guard.on_step_end(run, step_end(3, norm=float("inf"), skipped=True))
    guard.on_log(run, log_record(10))
    assert run.stop_reason.startswith("step 3: the gradient norm is inf")


def test_the_policy_acts_before_anything_is_saved(tmp_path):
    run, guard = make_run(tmp_path), NonFiniteGuard()
    guard.on_step_end(run, step_end(3, loss=NAN, skipped=True))

    def save(argument):
        assert run.stop_reason is not None
        return argument

    assert guard.wrap_save_checkpoint(run, save, "path") == "path"


def test_skip_goes_on_until_too_many_in_a_row(tmp_path, caplog):
    guard = NonFiniteGuard(NonFiniteGuardConfig(policy="skip", max_skips=3))
    run = make_run(tmp_path)
    for step, loss in enumerate([NAN, NAN, 1.0, NAN, NAN], 1):
        guard.on_step_end(run, step_end(step, loss=loss, skipped=loss != loss))
    guard.on_log(run, log_record(5))
    assert run.stop_reason is None and caplog.text.count("the weights were not changed") == 4

    resumed = NonFiniteGuard(NonFiniteGuardConfig(policy="skip", max_skips=3))
    resumed.load_state_dict(guard.state_dict())
    resumed.on_step_end(run, step_end(6, loss=NAN, skipped=True))
    resumed.on_log(run, log_record(6))
    assert run.stop_reason == "3 steps in a row were not finite" and run.exit_code == 1


def test_a_finite_run_leaves_nothing(tmp_path):
    run, guard = make_run(tmp_path), NonFiniteGuard()
    guard.on_step_end(run, step_end(1))
    guard.on_log(run, log_record(1))
    guard.on_run_end(run, result(tmp_path))
    assert run.stop_reason is None and list(tmp_path.iterdir()) == []


def test_batches_are_not_held_for_long(tmp_path):
    run, guard = make_run(tmp_path), NonFiniteGuard()
    guard.on_step_end(run, step_end(1, loss=NAN, skipped=True))
    for step in range(2, MAX_UNREAD + 1):
        guard.on_step_end(run, step_end(step))
    assert run.stop_reason is not None
