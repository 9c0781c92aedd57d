"""The local engine: the loss of a step does not depend on its split; no bad gradient is applied."""

import pytest
import torch
from toys import ToyModel, batch_of, document, sum_of_losses

from fasttrain.config.schema.engine import LocalEngineConfig
from fasttrain.core.batch import LossSum
from fasttrain.core.events import Callback, Hooks
from fasttrain.engine.local import LocalEngine
from fasttrain.runtime.precision import choose_precision

CPU = torch.device("cpu")
DOCUMENTS = [
    document([1, 2, 3, 4, 5], [False, False, True, True, True]),
    document([6, 7]),
    document([8, 9, 10, 1, 2, 3]),
    document([4, 4], [False, False]),
    document([5, 6, 7], [False, False, True]),
]
SPLITS = {
    "one": [[0, 1, 2, 3, 4]],
    "two": [[0, 1], [2, 3, 4]],
    "five": [[0], [1], [2], [3], [4]],
}


def engine_for(model, *, max_grad_norm=0.0, lr=0.1, fused=True, precision="fp32", hooks=None):
    engine = LocalEngine(
        LocalEngineConfig(), precision=choose_precision(precision, CPU), device=CPU
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=fused)
    engine.attach(model, optimizer, max_grad_norm=max_grad_norm, hooks=hooks or Hooks())
    return engine


def batches(split):
    return [batch_of(*(DOCUMENTS[i] for i in part)) for part in SPLITS[split]]


@pytest.mark.parametrize("split", SPLITS)
def test_a_step_does_not_depend_on_its_split(split):
    model, whole = ToyModel(), ToyModel()
    gradients = []

    class Look(Callback):
        def wrap_optimizer_step(self, run, call, skip):
            gradients.extend(p.grad.clone() for p in model.parameters())
            call(skip)

    hooks = Hooks([Look()])
    hooks.bind(object())
    result = engine_for(model, hooks=hooks).train_step(batches(split), sum_of_losses(model))
    flat = batch_of(*DOCUMENTS)
    loss = whole.token_losses(flat) / flat.num_supervised
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in whole.parameters()])
    for ours, reference in zip(gradients, whole.parameters(), strict=True):
        torch.testing.assert_close(ours, reference.grad, rtol=1e-5, atol=1e-7)
    torch.optim.AdamW(whole.parameters(), lr=0.1, weight_decay=0.0).step()
    assert result.num_supervised == flat.num_supervised
    assert result.num_tokens == flat.num_tokens
    torch.testing.assert_close(result.loss_sum / result.num_supervised, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(result.grad_norm, norm, rtol=1e-5, atol=0)
    for ours, reference in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


def test_clipping_scales_the_gradient_to_the_norm():
    model = ToyModel()
    seen = {}

    class Look(Callback):
        def wrap_optimizer_step(self, run, call, skip):
            seen["norm"] = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            call(skip)

    hooks = Hooks([Look()])
    hooks.bind(object())
    engine = engine_for(model, max_grad_norm=0.01, hooks=hooks)
    result = engine.train_step(batches("one"), sum_of_losses(model))
    assert result.grad_norm > 0.01
    torch.testing.assert_close(seen["norm"], torch.tensor(0.01), rtol=1e-3, atol=0)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(bad, fused):
    model = ToyModel()
    engine = engine_for(model, fused=fused, max_grad_norm=1.0)
    engine.train_step(batches("one"), sum_of_losses(model))
    weights = [p.detach().clone() for p in model.parameters()]
    slices = {(s.kind, s.name): s.tensor.clone() for s in engine.state_slices()}

    def poisoned(batch):
        return LossSum(model.token_losses(batch) * bad, batch.num_supervised)

    result = engine.train_step(batches("two"), poisoned)
    assert result.skipped
    for before, after in zip(weights, model.parameters(), strict=True):
        assert torch.equal(before, after)
    for part in engine.state_slices():
        assert torch.equal(part.tensor, slices[part.kind, part.name]), part.name


def test_nothing_supervised_is_a_step_with_loss_zero():
    model = ToyModel()
    result = engine_for(model).train_step([batch_of(DOCUMENTS[3])], sum_of_losses(model))
    assert result.num_supervised == 0
    assert result.loss_sum == 0
    assert not result.skipped


def test_a_loss_that_counts_otherwise_is_refused():
    model = ToyModel()

    def wrong(batch):
        return LossSum(model.token_losses(batch), 1)

    with pytest.raises(ValueError, match=r"counted 1 tokens where the batch has 11"):
        engine_for(model).train_step([batch_of(DOCUMENTS[0], DOCUMENTS[2], *DOCUMENTS[:1])], wrong)


def test_the_state_goes_on_bit_for_bit():
    model = ToyModel()
    engine = engine_for(model)
    engine.train_step(batches("two"), sum_of_losses(model))
    saved = [
        type(s)(s.kind, s.name, s.tensor.clone(), s.global_shape) for s in engine.state_slices()
    ]
    engine.train_step(batches("five"), sum_of_losses(model))

    fresh = ToyModel(seed=9)
    resumed = engine_for(fresh)
    resumed.load_slices(saved)
    resumed.train_step(batches("five"), sum_of_losses(fresh))
    for ours, theirs in zip(fresh.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_parameter_without_optimizer_state_goes_on_without():
    model, fresh = ToyModel(), ToyModel(seed=9)
    engine, resumed = engine_for(model), engine_for(fresh)
    engine._optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    resumed._optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1)
    engine.train_step(batches("one"), sum_of_losses(model))
    resumed.load_slices(list(engine.state_slices()))
    for ours, theirs in zip(fresh.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_missing_and_surplus_state_is_named():
    model = ToyModel()
    engine = engine_for(model)
    engine.train_step(batches("one"), sum_of_losses(model))
    slices = list(engine.state_slices())
    without = [s for s in slices if s.name != "head.bias"]
    with pytest.raises(ValueError, match=r"lacks model state of: head\.bias"):
        engine.load_slices(without)
    model.head.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"model state of unknown: head\.bias"):
        engine.load_slices(slices)


def test_mixed_precision_keeps_fp32_weights():
    model = ToyModel()
    dtypes = []
    model.head.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    engine = engine_for(model, precision="bf16-mixed")
    engine.train_step(batches("one"), sum_of_losses(model))
    assert dtypes == [torch.bfloat16]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


class Restless(ToyModel):
    """Counts its forward passes in buffers: one that is changed, one that is replaced."""

    def __init__(self):
        super().__init__()
        self.register_buffer("changed", torch.zeros(1))
        self.register_buffer("replaced", torch.zeros(1))
        self.unused = torch.nn.Parameter(torch.ones(3))
        self.head.bias.requires_grad_(False)

    def forward(self, batch):
        assert self.training
        self.changed += 1
        self.replaced = self.replaced + 1
        rows = torch.nn.functional.dropout(self.embedding(batch.input_ids), 0.5)
        return self.head(self.norm(rows))


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_loss_and_gradients_are_those_of_a_step_and_leave_no_trace(precision):
    model, batch = Restless(), batch_of(*DOCUMENTS)
    model.eval()
    taken = {}

    class Look(Callback):
        def wrap_optimizer_step(self, run, call, skip):
            named = model.named_parameters()
            taken.update({n: p.grad.clone() for n, p in named if p.grad is not None})

    hooks = Hooks([Look()])
    hooks.bind(object())
    engine = engine_for(model, precision=precision, hooks=hooks)
    kept = model.embedding.weight.grad = torch.ones_like(model.embedding.weight)
    replaced = model.replaced
    torch.manual_seed(1)
    loss, gradients = engine.loss_and_gradients(batch, sum_of_losses(model))
    assert model.embedding.weight.grad is kept and kept.eq(1).all()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["embedding.weight"]
    assert model.changed == 0 and model.replaced == 0 and model.replaced is replaced
    assert not loss.requires_grad and not engine.optimizer.state

    model.embedding.weight.grad = None
    torch.manual_seed(1)
    result = engine.train_step([batch], sum_of_losses(model))
    torch.testing.assert_close(loss * batch.num_supervised, result.loss_sum)
    assert gradients.pop("unused").eq(0).all()
    assert gradients.keys() == taken.keys() and "head.bias" not in gradients
    for name, gradient in gradients.items():
        assert torch.equal(gradient, taken[name]), name


def test_loss_and_gradients_of_nothing_supervised_are_zero():
    model, batch = ToyModel(), batch_of(DOCUMENTS[3])

    def constant(batch):
        return LossSum(torch.zeros(()), 0)

    for loss_function in (sum_of_losses(model), constant):
        loss, gradients = engine_for(model).loss_and_gradients(batch, loss_function)
        assert loss == 0 and len(gradients) == len(list(model.parameters()))
        assert not any(gradient.any() for gradient in gradients.values())


def test_buffers_are_put_back_after_a_pass_that_fails():
    model = Restless()

    def failing(batch):
        model(batch)
        raise RuntimeError("in the loss")

    with pytest.raises(RuntimeError, match="in the loss"):
        engine_for(model).loss_and_gradients(batch_of(*DOCUMENTS), failing)
    assert model.changed == 0 and model.replaced == 0


def test_evaluation_leaves_no_gradient_and_no_dropout():
    model = ToyModel()
    engine = engine_for(model)
    part = engine.eval_forward(batch_of(*DOCUMENTS), sum_of_losses(model))
    assert not part.sum.requires_grad
    assert not model.training
