"""The local engine with optimizers that clip, skip and keep masters themselves."""

import pytest
import torch
from fasttrain_kernels.optim import AdamW, GradientRelease
from toys import ToyModel, batch_of, document, sum_of_losses

from fasttrain.config.errors import UserError
from fasttrain.config.schema.engine import LocalEngineConfig
from fasttrain.core.batch import LossSum
from fasttrain.core.events import Hooks
from fasttrain.engine.gradient_sums import GradientSums
from fasttrain.engine.local import LocalEngine
from fasttrain.runtime.precision import choose_precision

CPU = torch.device("cpu")
DOCUMENTS = [
    document([1, 2, 3, 4, 5], [False, False, True, True, True]),
    document([6, 7]),
    document([8, 9, 10, 1, 2, 3]),
    document([5, 6, 7], [False, False, True]),
]
ONE, FOUR = [[0, 1, 2, 3]], [[0], [1], [2], [3]]


def batches(split):
    return [batch_of(*(DOCUMENTS[i] for i in part)) for part in split]


def engine_for(precision="fp32", *, max_grad_norm=0.0, released=False):
    chosen = choose_precision(precision, CPU, optimizer_keeps_masters=True)
    model = ToyModel().to(chosen.parameters)
    engine = LocalEngine(LocalEngineConfig(), precision=chosen, device=CPU)
    rounding = "master" if chosen.masters else "stochastic"
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.0, rounding=rounding)
    if released:
        GradientRelease(optimizer)
    engine.attach(model, optimizer, max_grad_norm=max_grad_norm, hooks=Hooks())
    return engine, model, optimizer


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def test_clipped_steps_are_those_of_torchs_optimizer():
    engine, model, _ = engine_for(max_grad_norm=0.01)
    other = ToyModel()
    theirs = LocalEngine(LocalEngineConfig(), precision=choose_precision("fp32", CPU), device=CPU)
    torchs = torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.0, fused=True)
    theirs.attach(other, torchs, max_grad_norm=0.01, hooks=Hooks())
    for _ in range(5):
        mine = engine.train_step(batches(FOUR), sum_of_losses(model))
        torch.testing.assert_close(
            mine.grad_norm, theirs.train_step(batches(FOUR), sum_of_losses(other)).grad_norm
        )
    assert mine.grad_norm > 0.01
    for ours, reference in zip(values(model), values(other), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


def test_16_bit_weights_have_masters_and_sums_of_gradients():
    norms = {}
    for name, split in (("one", ONE), ("four", FOUR)):
        engine, model, optimizer = engine_for("bf16-mixed")
        norms[name] = engine.train_step(batches(split), sum_of_losses(model)).grad_norm
        assert all(p.dtype == torch.bfloat16 and p.grad is None for p in model.parameters())
        assert all(optimizer.state[p]["master"].dtype == torch.float32 for p in model.parameters())
        assert all(getattr(p, "main_grad", None) is None for p in model.parameters())
    torch.testing.assert_close(norms["one"], norms["four"], rtol=4e-3, atol=0)


def test_an_optimizer_without_masters_is_refused_where_it_has_to_keep_them():
    """It would round every step to bf16, and see no gradient that was added up beside it."""
    engine, model, _ = engine_for("bf16-mixed")
    torchs = torch.optim.AdamW(model.parameters())
    with pytest.raises(UserError, match="AdamW keeps none"):
        engine.attach(model, torchs, max_grad_norm=0.0, hooks=Hooks())


def test_a_sum_loses_nothing_that_bfloat16_would():
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    model = torch.nn.ParameterList([parameter])
    sums = GradientSums(model)
    for _ in range(2):
        sums.begin(5)
        for part in (1.0, *[2.0**-9] * 4):  # 1 + 2^-9 is 1 in bfloat16
            (parameter.sum() * part).backward()
            assert parameter.grad is None
        assert parameter.main_grad.tolist() == [1 + 2.0**-7] * 3
        sums.end()
    sums.begin(1)
    parameter.sum().backward()
    assert parameter.grad is not None and parameter.main_grad is None


def test_sums_begin_anew_each_step():
    engine, model, _ = engine_for("bf16-mixed")
    twice, other, _ = engine_for("bf16-mixed")
    first = engine.train_step(batches(FOUR), sum_of_losses(model))
    twice.train_step(batches(ONE), sum_of_losses(other))  # one micro-batch uses none
    engine.load_slices(list(engine_for("bf16-mixed")[0].state_slices()))
    again = engine.train_step(batches(FOUR), sum_of_losses(model))
    assert torch.equal(first.grad_norm, again.grad_norm)


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_a_step_that_is_not_finite_is_skipped_and_the_next_is_not(precision):
    engine, model, optimizer = engine_for(precision, max_grad_norm=1.0)
    engine.train_step(batches(ONE), sum_of_losses(model))
    before = values(model)

    def poisoned(batch):
        return LossSum(model.token_losses(batch) * float("nan"), batch.num_supervised)

    assert engine.train_step(batches(FOUR), poisoned).skipped
    assert all(map(torch.equal, before, values(model)))
    assert not engine.train_step(batches(ONE), sum_of_losses(model)).skipped
    assert not all(map(torch.equal, before, values(model)))
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


def test_a_loss_that_is_not_finite_skips_even_where_gradients_are():
    engine, model, _ = engine_for()
    before = values(model)

    def lost(batch):
        loss = model.token_losses(batch)
        return LossSum(loss + (torch.tensor(float("inf")) if batch else 0), batch.num_supervised)

    result = engine.train_step(batches(ONE), lost)
    assert result.skipped and result.grad_norm.isfinite()
    assert all(map(torch.equal, before, values(model)))


def test_gradient_release_takes_the_same_steps():
    engine, model, _ = engine_for(released=True)
    plain, other, _ = engine_for()
    for _ in range(3):
        mine = engine.train_step(batches(ONE), sum_of_losses(model))
        theirs = plain.train_step(batches(ONE), sum_of_losses(other))
        torch.testing.assert_close(mine.grad_norm, theirs.grad_norm, rtol=1e-6, atol=0)
    assert all(map(torch.equal, values(model), values(other)))


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16"])
def test_state_goes_on_bit_for_bit(precision):
    engine, model, _ = engine_for(precision, max_grad_norm=1.0)
    engine.train_step(batches(FOUR), sum_of_losses(model))
    saved = list(engine.state_slices())
    kinds = {part.name.rpartition("/")[2] for part in saved if part.kind == "optimizer"}
    assert ("master" in kinds) == (precision == "bf16-mixed")
    saved = [part.__class__(**{**vars(part), "tensor": part.tensor.clone()}) for part in saved]
    again, other, _ = engine_for(precision, max_grad_norm=1.0)
    again.load_slices(saved)
    for _ in range(2):
        engine.train_step(batches(FOUR), sum_of_losses(model))
        again.train_step(batches(FOUR), sum_of_losses(other))
    assert all(map(torch.equal, values(model), values(other)))
