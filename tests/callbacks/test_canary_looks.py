"""What the canary makes of differences, on an engine whose kernels are wrong by known amounts."""

import contextlib
import logging
from types import SimpleNamespace

import fasttrain_kernels
import pytest
import torch
from fake_run import make_run
from toys import batch_of, document, step_batch

from fasttrain.callbacks.canary import Canary
from fasttrain.config.schema.callback import CanaryConfig
from fasttrain.core.events import StepStart
from fasttrain.core.interfaces import Topology
from fasttrain.core.kernel_plan import EAGER, KernelPlan, KernelSite

OPS = ("rms_norm", "rope", "swiglu")
SEED = 5
NOTHING = batch_of(document([4, 4], [False, False]))
SOMETHING = batch_of(document([1, 2, 3]))


class Engine:
    """With references loss and gradient are 1; each kernel in use adds its fault to the latter."""

    topology = Topology()
    device = torch.device("cpu")
    precision = SimpleNamespace(activations=torch.float32)

    def __init__(self, error=None, reference=1.0, **faults):
        self.faults, self.error, self.reference = faults, error, reference
        self.asked, self.batches, self.draws = {}, [], []
        self.may_run = False

    @contextlib.contextmanager
    def use(self, **asked):
        self.asked = asked
        yield
        self.asked = {}

    @contextlib.contextmanager
    def paused(self):
        self.may_run = True
        yield
        self.may_run = False

    def loss_and_gradients(self, batch, loss):
        assert self.may_run, "the training's clock is running"
        self.batches.append(batch)
        self.draws.append(next_draw())
        if self.error is not None:
            raise self.error
        mode, asked = self.asked.get("mode"), self.asked
        kernels = [op for op in OPS if mode != EAGER and asked.get(op) != EAGER]
        fault = sum(self.faults.get(op, 0.0) for op in kernels)
        value = torch.full((4,), self.reference + fault)
        return torch.tensor(self.reference), {"weight": value, "bias": value[:1]}


class Passing(dict):
    """Faults that are there the first time only."""

    def get(self, op, default):
        return self.pop(op, default)


def next_draw():
    return torch.rand(()).item()


@pytest.fixture
def set_aside(monkeypatch):
    """What was put in quarantine."""
    found = []

    def quarantine(op, backend, reason, *, device):
        found.append((op, backend))

    monkeypatch.setattr(fasttrain_kernels, "quarantine", quarantine)
    return found


@pytest.fixture
def look(tmp_path, monkeypatch, caplog):
    """Lets a canary see the starts of steps on an engine; the run."""
    caplog.set_level(logging.INFO, "fasttrain")

    def look(engine, *, steps=(1,), batches=(SOMETHING,), sites=None, **options):
        monkeypatch.setattr(fasttrain_kernels, "use", engine.use)
        sites = [KernelSite("a", op, "cpu") for op in OPS] if sites is None else sites
        plan = KernelPlan(tuple(sites))
        run = make_run(tmp_path, engine=engine, kernels=plan, paused=engine.paused)
        canary = Canary(CanaryConfig(**options))
        canary.on_train_start(run, None)
        torch.manual_seed(SEED)
        for step in steps:
            canary.on_step_start(run, StepStart(step, step_batch(*batches), loss=None))
        return run

    return look


def test_two_wrong_kernels_are_both_named_and_no_other_is_set_aside(look, set_aside, caplog):
    run = look(Engine(rms_norm=0.1, rope=0.1), policy="quarantine")
    assert run.interval.metrics["canary_loss_difference"] == 0
    assert run.interval.metrics["canary_gradient_difference"] == pytest.approx(0.2)
    assert "(loss 0.0e+00, gradient 2.0e-01); culprits: rms_norm (cpu), rope (cpu)" in caplog.text
    assert set_aside == [("rms_norm", "cpu"), ("rope", "cpu")] and run.stop_reason is None


def test_every_backend_of_a_culprit_is_set_aside(look, set_aside):
    sites = [KernelSite(path, "rope", backend) for path, backend in ("ax", "by", "cx")]
    look(Engine(rope=0.1), sites=[*sites, KernelSite("d", "rope", EAGER)], policy="quarantine")
    assert set_aside == [("rope", "x"), ("rope", "y")]


def test_small_differences_that_add_up_are_nobodys_fault(look, set_aside, caplog):
    look(Engine(rms_norm=0.04, rope=0.03), bound=0.05, policy="quarantine")
    said = "no op is to blame alone, most comes from rms_norm (loss 0.0e+00, gradient 4.0e-02)"
    assert said in caplog.text and set_aside == []


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_what_is_not_finite_is_beyond_any_bound(look, caplog, fault):
    run = look(Engine(swiglu=fault), bound=1e30)
    assert run.interval.metrics["canary_gradient_difference"] == float("inf")
    assert "the culprit is swiglu (cpu)" in caplog.text


@pytest.mark.parametrize(("bound", "told"), [(0.09, True), (0.11, False), (None, True)])
def test_the_bound_is_relative(look, caplog, bound, told):
    look(Engine(reference=50.0, rope=5.0), bound=bound)
    assert ("the culprit is rope" in caplog.text) == told


def test_references_that_are_not_finite_compare_nothing(look, caplog):
    run = look(Engine(reference=float("nan")))
    assert run.interval.metrics == {}
    assert "step 1 is not finite with the references either" in caplog.text


def test_it_looks_at_the_first_step_and_every_so_many_after(look):
    engine = Engine()
    look(engine, steps=range(1, 9), every_steps=3)
    assert len(engine.batches) == 2 * 3, "steps 1, 4 and 7, each with references and kernels"


def test_of_several_looks_between_two_lines_the_worst_is_logged(look):
    engine = Engine()
    engine.faults = Passing(rope=1e-4)
    run = look(engine, steps=(1, 2), every_steps=1)
    assert len(engine.batches) == 4
    assert run.interval.metrics["canary_gradient_difference"] == pytest.approx(1e-4, 1e-2)


def test_each_pass_draws_the_numbers_that_the_step_will_draw(look):
    engine = Engine(rope=1.0)
    look(engine)
    assert len(engine.draws) == 2 + len(OPS) and set(engine.draws) == {next_draw()}


def test_a_micro_batch_without_a_supervised_token_is_passed_over(look):
    engine = Engine()
    look(engine, batches=(NOTHING, SOMETHING))
    assert engine.batches == [SOMETHING, SOMETHING]
    run = look(Engine(error=AssertionError("nothing to learn")), batches=(NOTHING,))
    assert run.interval.metrics == {}


def test_what_does_not_fit_into_memory_is_told_once_and_not_tried_again(look, caplog):
    engine = Engine(error=torch.OutOfMemoryError("tried to allocate 9 GiB"))
    run = look(engine, steps=(1, 2, 3), every_steps=1)
    assert len(engine.batches) == 1 and run.stop_reason is None and not engine.may_run
    assert caplog.text.count("nothing is compared from here on (tried to allocate 9 GiB)") == 1
    assert engine.draws == [next_draw()]
