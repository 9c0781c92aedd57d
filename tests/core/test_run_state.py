"""What a checkpoint keeps of a run comes back bit for bit, through JSON text."""

import json
import math
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR

from fasttrain.config.errors import UserError
from fasttrain.config.schema.engine import LocalEngineConfig
from fasttrain.core.events import Callback, Hooks
from fasttrain.core.run import Interval, Run
from fasttrain.engine.local import LocalEngine
from fasttrain.runtime.precision import choose_precision

CPU = torch.device("cpu")


class Counting(Callback):
    def __init__(self, count=0):
        super().__init__()
        self.count = count

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class Other(Counting):
    pass


def run_with(tmp_path, *, schedule=None, lr=0.1, callbacks=(), run_id="run-a"):
    run = Run(config=SimpleNamespace(), directory=tmp_path, hooks=Hooks(callbacks), run_id=run_id)
    run.optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=lr)
    schedule = schedule or (lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (step + 1)))
    run.scheduler = schedule(run.optimizer)
    run.total_steps = 100
    run.data = SimpleNamespace(fingerprint="toy")
    run.engine = LocalEngine(
        LocalEngineConfig(), precision=choose_precision("fp32", CPU), device=CPU
    )
    run.engine.attach(
        torch.nn.ParameterList(run.optimizer.param_groups[0]["params"]),
        run.optimizer,
        max_grad_norm=0.0,
        hooks=run.hooks,
    )
    return run


def advance(run, steps=3):
    for _ in range(steps):
        run.optimizer.step()
        run.scheduler.step()
        run.step += 1


def through_text(run):
    return json.loads(json.dumps(run.state_dict()))


def test_every_counter_comes_back_exactly(tmp_path):
    run = run_with(tmp_path)
    advance(run)
    run.epoch, run.step_in_epoch, run.tokens, run.supervised_tokens = 2, 7, 10**15, 12345
    run.last_learning_rate = 0.1 / 3
    run.loss, run.eval_loss, run.eval_step = 0.1 + 0.2, math.pi, 3
    run.best_eval_loss, run.best_step = 5e-324, 2
    run.interval = Interval(
        loss_sum=1 / 3, counted_tokens=5, supervised_tokens=6, tokens=7, steps=2, skipped_steps=1,
        seconds=0.7, extras={"accuracy": 2 / 3}, metrics={"canary_loss_difference": 1e-7 / 3},
    )  # fmt: skip
    fresh = run_with(tmp_path)
    fresh.load_state_dict(through_text(run))
    expected = {k: v for k, v in vars(run).items() if k not in BLOCKS}
    assert {k: v for k, v in vars(fresh).items() if k not in BLOCKS} == expected


BLOCKS = ("engine", "hooks", "optimizer", "scheduler", "config")


def test_a_loss_that_is_not_finite_can_be_kept(tmp_path):
    run = run_with(tmp_path)
    run.loss, run.eval_loss = math.nan, math.inf
    fresh = run_with(tmp_path)
    fresh.load_state_dict(through_text(run))
    assert math.isnan(fresh.loss) and fresh.eval_loss == math.inf


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: LambdaLR(optimizer, lambda step: 0.9**step),
        lambda optimizer: StepLR(optimizer, step_size=2, gamma=0.3),
        lambda optimizer: OneCycleLR(optimizer, max_lr=1.0, total_steps=50),
    ],
)
def test_the_schedule_goes_on_at_the_same_rates(tmp_path, schedule):
    run = run_with(tmp_path, schedule=schedule)
    advance(run, 5)
    fresh = run_with(tmp_path, schedule=schedule)
    fresh.load_state_dict(through_text(run))
    for _ in range(4):
        assert fresh.optimizer.param_groups[0]["lr"] == run.optimizer.param_groups[0]["lr"]
        assert fresh.scheduler.get_last_lr() == run.scheduler.get_last_lr()
        advance(run, 1), advance(fresh, 1)


def test_a_peak_rate_that_was_changed_on_purpose_counts_at_once(tmp_path):
    run = run_with(tmp_path, lr=0.1)
    advance(run)
    fresh = run_with(tmp_path, lr=0.4)
    fresh.load_state_dict(through_text(run))
    assert fresh.optimizer.param_groups[0]["lr"] == 0.4 * (1 / 4)
    assert fresh.scheduler.get_last_lr() == [0.4 * (1 / 4)]
    advance(fresh, 1)
    assert fresh.optimizer.param_groups[0]["lr"] == 0.4 * (1 / 5)


def test_callbacks_get_their_own_state(tmp_path):
    run = run_with(tmp_path, callbacks=[Counting(1), Other(2), Counting(3)])
    fresh = run_with(tmp_path, callbacks=[Counting(), Counting(), Other()])
    fresh.load_state_dict(through_text(run))
    assert [callback.count for callback in fresh.hooks.callbacks] == [1, 3, 2]


def test_a_callback_that_is_new_keeps_its_own_state(tmp_path):
    fresh = run_with(tmp_path, callbacks=[Other(9)])
    fresh.load_state_dict(through_text(run_with(tmp_path, callbacks=[Counting(1)])))
    assert fresh.hooks.callbacks[0].count == 9


@pytest.mark.parametrize("run_id", ["run-a", "run-b"])
def test_an_aim_that_was_reached_stops_the_same_run_only(tmp_path, run_id):
    run = run_with(tmp_path)
    run.stop("no new best in 3 evaluations", finished=True)
    state = through_text(run)
    assert state["finished"] is True
    fresh = run_with(tmp_path, run_id=run_id)
    fresh.load_state_dict(state)
    assert fresh.finished is (run_id == "run-a")
    assert fresh.run_id == run_id


def test_a_signal_does_not_stop_the_resumed_run(tmp_path):
    run = run_with(tmp_path)
    run.stop("signal SIGTERM", exit_code=143)
    fresh = run_with(tmp_path)
    fresh.load_state_dict(through_text(run))
    assert fresh.stop_reason is None and fresh.exit_code == 0


def test_another_format_is_refused(tmp_path):
    run = run_with(tmp_path)
    with pytest.raises(UserError, match=r"state\.json: .* format 99, this version .* reads 1"):
        run.load_state_dict({**through_text(run), "format": 99})


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (torch.ones(2), r"state\.callbacks\[0\]\.state\.count: Tensor is no JSON"),
        ((1, 2), "tuple is no JSON"),
        ({1: 2}, "its key 1 is no string"),
    ],
)
def test_what_json_would_change_is_refused_by_name(tmp_path, value, named):
    run = run_with(tmp_path, callbacks=[Counting(value)])
    with pytest.raises(TypeError, match=named):
        run.state_dict()


def test_other_training_documents_are_refused(tmp_path):
    state = through_text(run_with(tmp_path))
    other = run_with(tmp_path)
    other.data = SimpleNamespace(fingerprint="edited")
    with pytest.raises(UserError, match=r"data\.sources: the training documents are not those"):
        other.load_state_dict(state)
    # Taking a checkpoint to other data on purpose is another run.
    fork = run_with(tmp_path, run_id="run-b")
    fork.data = SimpleNamespace(fingerprint="edited")
    fork.load_state_dict(state)


def test_the_format_number_covers_these_fields(tmp_path):
    # Where this fails, checkpoints written before may not be read any more: raise run_state.FORMAT,
    # or show that they still are, as below.
    state = run_with(tmp_path).state_dict()
    assert list(state["counters"]) == [
        "step", "epoch", "step_in_epoch", "tokens", "supervised_tokens", "last_learning_rate",
        "loss", "eval_loss", "eval_step", "best_eval_loss", "best_step",
    ]  # fmt: skip
    assert list(state["interval"]) == [each.name for each in fields(Interval)] == [
        "loss_sum", "counted_tokens", "supervised_tokens", "tokens", "steps", "skipped_steps",
        "seconds", "extras", "metrics",
    ]  # fmt: skip


def test_a_state_from_before_the_intervals_metrics_is_read(tmp_path):
    state = through_text(run_with(tmp_path))
    del state["interval"]["metrics"]
    fresh = run_with(tmp_path)
    fresh.load_state_dict(state)
    assert fresh.interval == Interval()
