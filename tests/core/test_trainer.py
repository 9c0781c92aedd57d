"""The loop over toy blocks: what happens after a step, and in which order."""

import signal
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toys import ToyModel, batch_of, document, step_batch

from fasttrain.config.errors import UserError
from fasttrain.config.schema.checkpoint import CheckpointSection
from fasttrain.config.schema.engine import LocalEngineConfig
from fasttrain.config.schema.run import EvalConfig, LoggingConfig
from fasttrain.core.batch import LossSum
from fasttrain.core.checkpoint_interface import Checkpoint, ResumableCheckpoint, UnfitToSave
from fasttrain.core.events import Callback, Hooks
from fasttrain.core.run import SAVE_FAILED, Run
from fasttrain.core.saving import Saver
from fasttrain.core.signals import stop_on_signals
from fasttrain.engine.local import LocalEngine
from fasttrain.runtime.precision import choose_precision
from fasttrain.trainers.sft import SFTTrainer

CPU = torch.device("cpu")
STEPS_IN_EPOCH = 4


class ToyData:
    """Four steps an epoch; every fourth document is longer, so that token counts differ."""

    def steps_in_epoch(self, epoch):
        return STEPS_IN_EPOCH

    def stream(self, epoch, step):
        while True:
            while step < STEPS_IN_EPOCH:
                ids = list(range(1, 4 + step))
                yield step_batch(batch_of(document(ids)), epoch=epoch, step=step)
                step += 1
            epoch, step = epoch + 1, 0


class ToyHeldOut:
    """Two batches of 1 and 5 supervised tokens: a plain mean of means would be wrong."""

    def batches(self):
        yield batch_of(document([1, 2]))
        yield batch_of(document([3, 4, 5, 6, 7, 8]))


class Recorder(Callback):
    """Keeps the order of what it is told."""

    def __init__(self):
        super().__init__()
        self.events, self.logs, self.evaluations = [], [], []

    def on_train_start(self, run, record):
        self.events.append("start")

    def on_step_end(self, run, record):
        self.events.append(f"step {record.step}")

    def on_log(self, run, record):
        self.events.append(f"log {record.step}")
        self.logs.append(record)

    def on_evaluation_end(self, run, record):
        self.events.append(f"eval {record.step}")
        self.evaluations.append(record)

    def on_checkpoint_saved(self, run, record):
        self.events.append(f"save {record.kind} {record.step}")

    def on_train_end(self, run, record):
        self.events.append("end")


class CheckpointInMemory(ResumableCheckpoint):
    def save(self, run):
        return run.directory / str(run.step)

    def find(self, directory): ...

    def restore(self, run, path): ...


class ExportInMemory(Checkpoint):
    def save(self, run):
        return run.directory / "model"


def make_trainer(tmp_path, *, callbacks=(), checkpoints=(), total_steps=6, **settings):
    defaults = {
        "overfit_first_batch": False,
        "stop_after": None,
        "kill_file": None,
        "eval": EvalConfig(every_steps=100),
        "logging": LoggingConfig(every_steps=3),
    }
    config = SimpleNamespace(**{**defaults, **settings})
    recorder = Recorder()
    hooks = Hooks([recorder, *callbacks])
    model = ToyModel()
    engine = LocalEngine(LocalEngineConfig(), precision=choose_precision("fp32", CPU), device=CPU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = Run(config=config, directory=tmp_path, hooks=hooks, run_id="r", engine=engine)
    hooks.bind(run)
    engine.attach(model, optimizer, max_grad_norm=1.0, hooks=hooks)
    run.model, run.optimizer, run.total_steps = model, optimizer, total_steps
    run.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    run.data = SimpleNamespace(train=ToyData(), evaluation=ToyHeldOut())
    trainer = SFTTrainer(None, run, Saver(run, checkpoints))
    return trainer, recorder


def every(steps, *, at_end=True, kind="memory"):
    return CheckpointInMemory(CheckpointSection(type=kind, every_steps=steps, at_end=at_end))


def test_the_order_of_a_run(tmp_path):
    export = ExportInMemory(CheckpointSection(type="export"))
    trainer, recorder = make_trainer(tmp_path, checkpoints=[every(2), export], total_steps=3)
    trainer.train()
    # The final evaluation is the best so far, but its save and the last save are one.
    assert recorder.events == [
        "start", "step 1", "step 2", "save memory 2", "step 3", "log 3", "eval 3",
        "save memory 3", "end", "save export 3",
    ]  # fmt: skip
    assert trainer.run.finished


def test_the_logged_loss_is_weighted_by_tokens_over_the_interval(tmp_path):
    sums, counts = [], []

    class Look(Callback):
        def on_step_end(self, run, record):
            sums.append(record.result.loss_sum.item())
            counts.append(record.result.num_supervised)

    trainer, recorder = make_trainer(tmp_path, callbacks=[Look()], total_steps=4)
    trainer.train()
    first, last = recorder.logs
    assert (first.step, last.step) == (3, 4)  # the last step is logged whatever the interval
    assert first.loss == pytest.approx(sum(sums[:3]) / sum(counts[:3]), rel=1e-6)
    assert last.loss == pytest.approx(sums[3] / counts[3], rel=1e-6)
    assert first.supervised_tokens == sum(counts[:3])
    assert first.epoch == 0.75
    assert last.epoch == 1.0
    assert first.lr == pytest.approx(0.1 * 0.8)  # of step 3, counted from 0


def test_evaluation_is_weighted_by_tokens(tmp_path):
    trainer, recorder = make_trainer(tmp_path, eval=EvalConfig(every_steps=2))
    trainer.train()
    assert [e.step for e in recorder.evaluations] == [2, 4, 6]
    model = trainer.run.model
    held_out = list(ToyHeldOut().batches())
    total = sum(model.token_losses(batch).item() for batch in held_out)
    assert recorder.evaluations[-1].loss == pytest.approx(total / 6, rel=1e-5)
    best = min(recorder.evaluations, key=lambda e: e.loss)
    assert trainer.run.best_step == best.step


def test_stop_after_saves_and_leaves_the_rest(tmp_path):
    export = ExportInMemory(CheckpointSection(type="export"))
    trainer, recorder = make_trainer(tmp_path, checkpoints=[every(100), export], stop_after=2)
    trainer.train()
    assert recorder.events == ["start", "step 1", "step 2", "end", "save memory 2"]
    assert not trainer.run.finished
    assert trainer.run.exit_code == 0


def test_the_kill_file_stops(tmp_path):
    class Touch(Callback):
        def on_step_end(self, run, record):
            if record.step == 2:
                (run.directory / "STOP").touch()

    trainer, recorder = make_trainer(tmp_path, callbacks=[Touch()], checkpoints=[every(100)])
    trainer.train()
    assert recorder.events[-1] == "save memory 2"
    assert "STOP" in trainer.run.stop_reason


def test_a_stop_does_not_wait_for_an_evaluation_which_the_next_start_makes_up_for(tmp_path):
    settings = {"eval": EvalConfig(every_steps=2), "checkpoints": [every(100)]}
    trainer, recorder = make_trainer(tmp_path, stop_after=2, **settings)
    trainer.train()
    assert recorder.events == ["start", "step 1", "step 2", "end", "save memory 2"]
    resumed, recorder = make_trainer(tmp_path, **settings)
    resumed.run.step = resumed.run.step_in_epoch = 2
    resumed.train()
    assert recorder.events[:3] == ["start", "eval 2", "save memory 2"]


def test_an_evaluation_that_ends_the_run_leaves_no_step_unlogged(tmp_path):
    class Enough(Callback):
        def on_evaluation_end(self, run, record):
            run.stop("the loss no longer falls", finished=True)

    trainer, recorder = make_trainer(
        tmp_path, callbacks=[Enough()], eval=EvalConfig(every_steps=2), checkpoints=[every(2)]
    )
    trainer.train()
    assert recorder.events == [
        "start", "step 1", "step 2", "eval 2", "log 2", "save memory 2", "end",
    ]  # fmt: skip


def test_requests_of_a_callback(tmp_path):
    class Ask(Callback):
        def on_step_end(self, run, record):
            if record.step == 2:
                run.request_checkpoint()
                run.request_evaluation()
            if record.step == 4:
                run.stop("enough", finished=True)

    trainer, recorder = make_trainer(tmp_path, callbacks=[Ask()], checkpoints=[every(100)])
    trainer.train()
    assert "eval 2" in recorder.events
    assert "save memory 2" in recorder.events
    assert recorder.events[-4:] == ["log 4", "eval 4", "save memory 4", "end"]
    assert trainer.run.finished


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_names_its_exit_code(tmp_path, number):
    class Send(Callback):
        def on_step_end(self, run, record):
            if record.step == 2:
                signal.raise_signal(number)

    trainer, recorder = make_trainer(tmp_path, callbacks=[Send()], checkpoints=[every(100)])
    with stop_on_signals(trainer.run):
        trainer.train()
    assert recorder.events[-1] == "save memory 2"
    assert trainer.run.exit_code == 128 + number
    assert signal.Signals(number).name in trainer.run.stop_reason


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), UnfitToSave("NaN")])
def test_a_save_that_fails_is_told_and_training_goes_on(tmp_path, caplog, error):
    class Refuses(CheckpointInMemory):
        def save(self, run):
            if run.step in self.bad_steps:
                raise error
            return super().save(run)

    checkpoint = Refuses(CheckpointSection(type="memory", every_steps=2))
    checkpoint.bad_steps = {2}
    trainer, recorder = make_trainer(tmp_path, checkpoints=[checkpoint])
    trainer.train()
    assert "step 2 could not be saved" in caplog.text
    assert recorder.events[-2:] == ["save memory 6", "end"]
    assert trainer.run.exit_code == 0

    checkpoint.bad_steps = {6}
    trainer, recorder = make_trainer(tmp_path, checkpoints=[checkpoint])
    trainer.train()
    assert trainer.run.exit_code == SAVE_FAILED


class Fails(ExportInMemory):
    def save(self, run):
        raise OSError(28, "No space left on device")


def test_an_export_that_fails_is_not_forgotten_for_a_checkpoint_that_does_not(tmp_path):
    export = Fails(CheckpointSection(type="export"))
    trainer, recorder = make_trainer(tmp_path, checkpoints=[export, every(100)])
    trainer.train()
    assert "save memory 6" in recorder.events
    assert trainer.run.exit_code == SAVE_FAILED


def test_a_signal_whose_save_fails_does_not_say_that_it_was_saved(tmp_path):
    class Send(Callback):
        def on_step_end(self, run, record):
            if record.step == 2:
                signal.raise_signal(signal.SIGTERM)

    class FailsToo(Fails, CheckpointInMemory): ...

    checkpoint = FailsToo(CheckpointSection(type="memory"))
    trainer, _ = make_trainer(tmp_path, callbacks=[Send()], checkpoints=[checkpoint])
    with stop_on_signals(trainer.run):
        trainer.train()
    assert trainer.run.exit_code == SAVE_FAILED


def test_untrained_weights_are_not_saved_as_the_best(tmp_path):
    settings = EvalConfig(every_steps=2, at_start=True)
    trainer, recorder = make_trainer(
        tmp_path, checkpoints=[every(100)], eval=settings, total_steps=2
    )
    trainer.train()
    assert recorder.events == [
        "start", "eval 0", "step 1", "step 2", "log 2", "eval 2", "save memory 2", "end",
    ]  # fmt: skip


def test_a_held_out_loss_that_is_not_finite_is_never_the_best(tmp_path):
    class Poison(Callback):
        def wrap_evaluate(self, run, call):
            weights = run.model.head.weight
            saved = weights.detach().clone()
            with torch.no_grad():
                weights.mul_(float("nan") if run.step == 2 else 1.0)
            record = call()
            with torch.no_grad():
                weights.copy_(saved)
            return record

    trainer, recorder = make_trainer(tmp_path, callbacks=[Poison()], eval=EvalConfig(every_steps=2))
    trainer.train()
    first, second, _ = recorder.evaluations
    assert first.loss != first.loss and not first.is_best
    assert second.is_best


def test_overfit_first_batch_sees_one_batch(tmp_path):
    seen = []

    class Look(Callback):
        def on_step_start(self, run, record):
            seen.append(tuple(record.batch.micro_batches[0].input_ids.tolist()))

    trainer, _ = make_trainer(tmp_path, callbacks=[Look()], overfit_first_batch=True)
    trainer.train()
    assert set(seen) == {(1, 2, 3)}
    assert (trainer.run.epoch, trainer.run.step_in_epoch) == (1, 2)


def test_what_a_callback_does_in_a_pause_is_no_training_time(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("fasttrain.core.meter.time.perf_counter", lambda: clock.now)

    class Slow(Callback):
        def on_step_start(self, run, record):
            clock.now += 1
            with run.paused():
                clock.now += 100

    trainer, recorder = make_trainer(tmp_path, callbacks=[Slow()])
    trainer.train()
    assert [log.step_seconds for log in recorder.logs] == [1.0, 1.0]


def test_a_step_says_with_which_loss_it_begins(tmp_path):
    seen = {}

    class Doubled(Callback):
        def wrap_loss(self, run, call, model, batch):
            part = call(model, batch)
            return LossSum(part.sum * 2, part.count)

        def on_step_start(self, run, record):
            seen[record.step] = record.loss(record.batch.micro_batches[0]).sum.item()

        def on_step_end(self, run, record):
            assert seen[record.step] == pytest.approx(record.result.loss_sum.item())

    trainer, _ = make_trainer(tmp_path, callbacks=[Doubled()], total_steps=2)
    trainer.train()
    assert seen.keys() == {1, 2}


def test_a_skipped_step_counts_its_tokens_and_not_its_loss(tmp_path):
    class Poison(Callback):
        def wrap_loss(self, run, call, model, batch):
            part = call(model, batch)
            return LossSum(part.sum * float("nan"), part.count) if run.step == 1 else part

    trainer, recorder = make_trainer(tmp_path, callbacks=[Poison()], total_steps=3)
    trainer.train()
    (record,) = recorder.logs
    assert record.skipped_steps == 1
    assert record.supervised_tokens == 2 + 3 + 4
    assert record.loss == record.loss  # finite: the two good steps


def test_a_wrapper_that_doubles_the_loss(tmp_path):
    class Double(Callback):
        def wrap_loss(self, run, call, model, batch):
            part = call(model, batch)
            return LossSum(part.sum * 2, part.count)

    plain, plain_record = make_trainer(tmp_path, total_steps=1)
    plain.train()
    doubled, doubled_record = make_trainer(tmp_path, callbacks=[Double()], total_steps=1)
    doubled.train()
    assert doubled_record.logs[0].loss == pytest.approx(2 * plain_record.logs[0].loss)


def test_the_outermost_wrapper_is_the_first_callback(tmp_path):
    class Add(Callback):
        def __init__(self, name, order):
            super().__init__()
            self.name, self.order = name, order

        def wrap_loss(self, run, call, model, batch):
            self.order.append(self.name)
            return call(model, batch)

    order = []
    callbacks = [Add("first", order), Add("second", order)]
    trainer, _ = make_trainer(tmp_path, callbacks=callbacks, total_steps=1)
    trainer.step(step_batch(batch_of(document([1, 2]))))
    assert order[:2] == ["first", "second"]


def test_a_wrapper_that_forgets_to_return_is_named(tmp_path):
    class Forgets(Callback):
        def wrap_loss(self, run, call, model, batch):
            call(model, batch)

    trainer, _ = make_trainer(tmp_path, callbacks=[Forgets()])
    with pytest.raises(TypeError, match=r"Forgets\.wrap_loss returned NoneType.*LossSum"):
        trainer.train()


def test_a_misspelt_hook_is_refused_with_the_list():
    class Misspelt(Callback):
        def on_stepend(self, run, record): ...

    with pytest.raises(UserError, match=r"Misspelt\.on_stepend is no hook.*on_step_end"):
        Misspelt()


class HostTraffic(TorchDispatchMode):
    """Ops by which a number goes to the device or comes back: each would wait for a GPU."""

    OPS = ("aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in self.OPS:
            self.seen.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_a_step_between_two_logged_ones_never_waits_for_the_device(tmp_path):
    trainer, _ = make_trainer(tmp_path)
    run = trainer.run
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1, fused=True)
    run.scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 1.0)
    run.engine.attach(run.model, run.optimizer, max_grad_norm=1.0, hooks=run.hooks)
    trainer.meter.start()
    batches = run.data.train.stream(0, 0)
    trainer.step(next(batches))
    batch = next(batches)
    with HostTraffic() as traffic:
        trainer.step(batch)
    assert traffic.seen == []
    with HostTraffic() as traffic:
        trainer.meter.settle()
    assert traffic.seen  # it does see what waits
