"""The optimizers as torch's: against torch.optim, and in what they promise beyond it."""

import copy
import math
import mmap
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from fasttrain_kernels import KernelFailure, native
from fasttrain_kernels.ops.optimizer_step import native_step
from fasttrain_kernels.ops.optimizer_step.step import Numbers, Slot, Step
from fasttrain_kernels.ops.optimizer_step.table import CHUNK, Table
from fasttrain_kernels.optim import SGD, AdamW, GradientRelease, Lion, decay_groups
from fasttrain_kernels.registry import OPS
from optim_steps import (
    BF16,
    FEW,
    OURS,
    SHAPES,
    give_gradients,
    largest_difference,
    parameters,
    train,
    values,
)
from torch import nn

THEIRS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


# --- against torch.optim --------------------------------------------------------------------------


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_200_steps_are_torchs(name, clip, backend):
    kind, options = OURS[name]
    shapes = FEW if backend == "eager" else SHAPES
    mine, theirs = parameters(shapes=shapes), parameters(shapes=shapes)
    ours = kind(mine, 1e-3, max_grad_norm=clip, backend=backend, **options)
    torchs = THEIRS[name](theirs, 1e-3, **options)
    for step in range(200):
        give_gradients(mine, step)
        give_gradients(theirs, step)
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(theirs, clip)
        torchs.step()
        ours.step()
        if clip is not None:
            torch.testing.assert_close(ours.grad_norm, norm, rtol=1e-6, atol=0)
    assert largest_difference(values(mine), values(theirs)) <= 1e-6


def small_model(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(50, 32), nn.LayerNorm(32), nn.Linear(32, 50)).to(dtype)


def real_loss(model, step, count=64):
    """Of a task whose answers are random for 3 tokens of 10: no loss below 1.6 is to be had."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(50, (count,), generator=generator)
    noise = torch.randint(50, (count,), generator=generator)
    random = torch.rand(count, generator=generator) < 0.3
    answers = torch.where(random, noise, (tokens * 7 + 3) % 50)
    return nn.functional.cross_entropy(model(tokens).float(), answers)


def fit(model, optimizer, steps=200):
    for step in range(steps):
        loss = real_loss(model, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("name", THEIRS)
def test_200_steps_on_real_gradients_are_torchs(name):
    kind, options = OURS[name]
    mine, theirs = small_model(), small_model()
    fit(mine, kind(mine.parameters(), 1e-3, **options))
    fit(theirs, THEIRS[name](theirs.parameters(), 1e-3, **options))
    pairs = (values(model.parameters()) for model in (mine, theirs))
    assert largest_difference(*pairs) <= 1e-6


def test_lion_is_its_formula():
    (parameter,), start = parameters(shapes=[(40, 9)]), parameters(shapes=[(40, 9)])[0].detach()
    optimizer = Lion([parameter], 1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    value, moment = start.double(), torch.zeros(40, 9, dtype=torch.float64)
    for step in range(50):
        give_gradients([parameter], step)
        grad = parameter.grad.double()
        value = value * (1 - 1e-4) - 1e-3 * (0.9 * moment + 0.1 * grad).sign()
        moment = 0.99 * moment + 0.01 * grad
        optimizer.step()
    # 50 steps of two roundings each.
    assert ((parameter.detach() - value).abs() <= 100 * 2.0**-24 * (value.abs() + 0.1)).all()


# --- 16-bit parameters ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("rounding", ["master", "kahan"])
def test_16_bit_parameters_follow_a_simulation_in_float64(name, rounding):
    """Of a master: each step adds a few roundings of float32. With Kahan's compensation what is
    kept has 16 bits together, so that each step adds one of 2^-16 of the value."""
    kind, options = OURS[name]
    mine = parameters(BF16, FEW)
    exact = [nn.Parameter(p.detach().double()) for p in mine]
    ours = kind(mine, 1e-3, rounding=rounding, **options)
    simulation = kind(exact, 1e-3, backend="eager", **options)
    steps = 200
    for step in range(steps):
        give_gradients(mine, step)
        for parameter, other in zip(mine, exact, strict=True):
            other.grad = parameter.grad.double()
        ours.step()
        simulation.step()
    for parameter, other in zip(mine, exact, strict=True):
        state, value = ours.state[parameter], other.detach()
        size = value.abs() + 0.1  # gradients and steps are of this size at most
        if rounding == "master":
            kept, each = state["master"].double(), 4 * 2.0**-24
            assert torch.equal(parameter.detach(), state["master"].bfloat16())
        else:
            kept, each = parameter.detach().double() + state["compensation"].double(), 2.0**-16
        # Lion's sign may differ where its mean is 0 to a rounding: by twice the rate.
        signs = 2e-3 * 3 if name == "lion" else 0.0
        assert ((kept - value).abs() <= steps * each * size + signs).all()
        if name == "lion" and value.numel() > 100:
            assert ((kept - value).abs() <= steps * each * size).double().mean() > 0.999


@pytest.mark.parametrize("name", OURS)
def test_rounding_at_random_is_unbiased(name):
    """The mean over many equal elements follows the float32 one, which rounding to nearest can't: a
    step is a 16th of what a weight of bfloat16 can change by."""
    kind, options = OURS[name]
    count, steps = 20_000, 40
    rates = {"adamw": 1e-4, "lion": 1e-4, "sgd": 5e-5}
    results = {}
    for dtype in (torch.float32, BF16):
        parameter = nn.Parameter(torch.full((count,), 0.75).to(dtype))
        optimizer = kind([parameter], rates[name], rounding="stochastic", **options)
        for _ in range(steps):
            parameter.grad = torch.full((count,), 0.5, dtype=dtype)
            optimizer.step()
        results[dtype] = parameter.detach().double()
    step = 2.0**-8  # between neighbours of bfloat16 at 0.75
    expected, kept = float(results[torch.float32].mean()), results[BF16]
    assert abs(expected - 0.75) > step / 2
    assert abs(float(kept.mean()) - expected) < 4 * float(kept.std()) / math.sqrt(count)
    assert float(kept.std()) > 0


@pytest.mark.parametrize("moments", ["float32", "bfloat16", "8bit"])
def test_how_a_tensor_is_cut_changes_no_bit(moments):
    whole = nn.Parameter(torch.randn(3000, generator=torch.Generator().manual_seed(0)).to(BF16))
    cuts = (0, 256, 1024, 2816, 3000) if moments == "8bit" else (0, 1, 300, 2047, 3000)
    slices = [nn.Parameter(whole.detach()[begin:end].clone()) for begin, end in pairwise(cuts)]
    options = {"rounding": "stochastic", "moments": moments, "seed": 5}
    other = nn.Parameter(torch.ones(10, dtype=BF16))
    one = AdamW([whole, other], 1e-2, **options)
    # Elsewhere in the list, and the last of them first, as other ranks would hold them.
    many = AdamW([nn.Parameter(torch.ones(4).to(BF16)), *reversed(slices)], 1e-2, **options)
    for begin, parameter in zip(cuts, slices, strict=False):
        many.declare_slice(parameter, tensor=0, offset=begin)
    for step in range(20):
        give_gradients([whole], step)
        for begin, parameter in zip(cuts, slices, strict=False):
            parameter.grad = whole.grad[begin : begin + parameter.numel()].clone()
        one.step()
        many.step()
    assert torch.equal(torch.cat(values(slices)), whole.detach())


def test_numbers_of_elements_beyond_32_bits_have_bits_of_their_own():
    def stepped(offset):
        parameter = nn.Parameter(torch.full((600,), 0.75, dtype=BF16))
        optimizer = SGD([parameter], 1e-3, rounding="stochastic")
        optimizer.declare_slice(parameter, tensor=0, offset=offset)
        parameter.grad = torch.full((600,), 0.5, dtype=BF16)
        optimizer.step()
        return parameter.detach()

    assert not torch.equal(stepped(0), stepped(1 << 32))
    assert torch.equal(stepped((1 << 32) - 256)[256:], stepped(1 << 32)[:344])


@pytest.mark.parametrize("name", OURS)
def test_8_bits_train_as_well_as_float32(name):
    kind, options = OURS[name]
    rate = {"adamw": 3e-3, "lion": 1e-3, "sgd": 1.0}[name]
    options = {**options, "weight_decay": 0.0}
    losses = {}
    for moments in ("float32", "8bit"):
        model = small_model()
        fit(model, kind(model.parameters(), rate, moments=moments, **options), 400)
        with torch.no_grad():
            losses[moments] = float(real_loss(model, -1, 8192))
    with torch.no_grad():
        start = float(real_loss(small_model(), -1, 8192))
    assert losses["float32"] < 0.7 * start
    assert abs(losses["8bit"] / losses["float32"] - 1) < 0.01


# --- promises -------------------------------------------------------------------------------------


@pytest.mark.parametrize("moments", ["float32", "8bit"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad, moments):
    params = parameters(BF16)
    optimizer = AdamW(params, 1e-2, max_grad_norm=1.0, moments=moments)
    train(optimizer, params, 3)
    before = copy.deepcopy((values(params), optimizer.state_dict()["state"]))
    give_gradients(params, 9)
    params[0].grad[3, 3] = bad
    optimizer.step()
    assert not optimizer.grad_norm.isfinite()
    after = (values(params), optimizer.state_dict()["state"])
    assert all(map(torch.equal, before[0], after[0]))
    for index, state in before[1].items():
        assert all(torch.equal(value, after[1][index][key]) for key, value in state.items())
    train(optimizer, params, 1)
    assert float(optimizer.state[params[0]]["step"]) == 4


def test_more_elements_than_32_bits_count():
    """The end of 4 GB of bfloat16, by a table that leaves out the chunks before: to touch all of it
    takes 40 seconds."""
    if (reason := native.why_not("_C_cpu")) is not None:
        pytest.skip(reason)
    count = (1 << 31) + 777
    param, grad = (torch.frombuffer(mmap.mmap(-1, 2 * count), dtype=BF16) for _ in range(2))
    grad[-5:] = 1
    steps = torch.zeros(())
    slot = Slot(param, grad, steps, None, None, None, None, None, stream=0, offset=0, group=0)
    table = Table().of([slot])
    table[0, -2] = -((count - 5) // CHUNK)  # chunks of the rows before it
    numbers = torch.tensor([Numbers(1.0, 0, 0, 0, 0)], dtype=torch.float64)
    rows = SimpleNamespace(of=lambda slots: table, workspace=lambda size: torch.zeros(size).long())
    native_step.run(Step("sgd", "stochastic", "none", [slot], numbers, table=rows))
    assert param[-7:].tolist() == [0, 0, -1, -1, -1, -1, -1]
    assert steps == 1


def test_a_learning_rate_may_be_a_tensor_and_change():
    mine, theirs = parameters(), parameters()
    rate = torch.tensor(1e-2)
    ours, torchs = AdamW(mine, rate), torch.optim.AdamW(theirs, 1e-2)
    for step in range(4):
        train(ours, mine, 1, start=step)
        train(torchs, theirs, 1, start=step)
        rate *= 0.5
        torchs.param_groups[0]["lr"] *= 0.5
    assert largest_difference(values(mine), values(theirs)) < 1e-6


def test_schedulers_groups_and_options_by_group():
    params = parameters()
    groups = [{"params": params[:2], "lr": 1e-2}, {"params": params[2:], "moments": "8bit"}]
    optimizer = AdamW(groups, 1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train(optimizer, params, 2)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3, 5e-4]
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float32
    assert optimizer.state[params[2]]["exp_avg"].dtype == torch.uint8
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "rounding": "kahan"})
    with pytest.raises(ValueError, match="lr=-1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "lr": -1})


def test_gradients_added_up_in_float32_go_first():
    parameter = nn.Parameter(torch.ones(4, dtype=BF16))
    parameter.main_grad = torch.full((4,), 2.0)
    SGD([parameter], 0.25).step()
    assert parameter.detach().tolist() == [0.5] * 4


def test_a_grad_scaler_of_torch():
    model = nn.Linear(4, 4)
    optimizer = AdamW(model.parameters(), 1e-2, max_grad_norm=1e9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    theirs = copy.deepcopy(model)
    torchs = torch.optim.AdamW(theirs.parameters(), 1e-2)
    x = torch.randn(3, 4)
    scaler.scale(model(x).square().mean()).backward()
    theirs(x).square().mean().backward()
    scaler.step(optimizer)
    scaler.update()
    torchs.step()
    assert largest_difference(values(model.parameters()), values(theirs.parameters())) < 1e-6
    before = values(model.parameters())
    model.weight.grad[0, 0] = math.inf
    scaler.step(optimizer)
    assert all(map(torch.equal, before, values(model.parameters())))


def test_autograd_knows_that_parameters_have_changed():
    parameter = nn.Parameter(torch.ones(3))
    loss = parameter.square().sum()
    parameter.grad = torch.ones(3)
    AdamW([parameter]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_closure_is_called_with_gradients():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = SGD([parameter], 0.5)

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():  # as torch's optimizers, whose callers need no gradients either
        assert optimizer.step(closure).item() == 3
    assert parameter.detach().tolist() == [0, 0, 0]


def test_gradients_are_cleared_by_the_step_where_that_is_asked_for():
    params = parameters(shapes=[(7, 9)])
    params.append(nn.Parameter(torch.randn(9, 7).t()))
    optimizer = AdamW(params, zero_grad_in_step=True)
    train(optimizer, params, 1)
    assert all(parameter.grad.abs().max() == 0 for parameter in params)


def test_decay_by_rule():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 5))
    model[3].weight = model[0].weight
    decayed, others = decay_groups(model, 0.1)
    assert [name for name, _ in decayed["params"]] == ["1.weight"]
    assert [name for name, _ in others["params"]] == [
        "0.weight",
        "1.bias",
        "2.weight",
        "2.bias",
        "3.bias",
    ]
    optimizer = AdamW([decayed, others], 1e-3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    with pytest.raises(ValueError, match="none of the model's parameters"):
        decay_groups(nn.ReLU(), 0.1)


def test_steps_in_the_backward_pass():
    mine, theirs = small_model(), small_model()
    ours = AdamW(mine.parameters(), 1e-3)
    release = GradientRelease(ours)
    other = AdamW(theirs.parameters(), 1e-3)
    for step in range(5):
        real_loss(mine, step).backward()
        assert all(parameter.grad is None for parameter in mine.parameters())
        real_loss(theirs, step).backward()
        torch.testing.assert_close(ours.measure(), other.measure(), rtol=1e-6, atol=0)
        ours.step()
        other.step()
        other.zero_grad()
    assert all(map(torch.equal, values(mine.parameters()), values(theirs.parameters())))
    release.remove()
    real_loss(mine, 9).backward()
    assert all(parameter.grad is not None for parameter in mine.parameters())
    with pytest.raises(ValueError, match=r"max_grad_norm=1\.0 needs all gradients at once"):
        GradientRelease(AdamW(theirs.parameters(), max_grad_norm=1.0))


def test_a_step_that_fails_is_not_made_again(monkeypatch, own_cache):
    op = OPS["optimizer_step"]
    kernel = op.candidate("cpu").load()
    if kernel.unsupported(op.describe(device="cpu", dtype=torch.float32)) is not None:
        pytest.skip("no C++ kernel here")

    def fails(work):
        raise RuntimeError("half way through")

    params = parameters(shapes=[(3,)])
    optimizer = AdamW(params)
    train(optimizer, params, 1)
    monkeypatch.setattr(kernel, "step", fails)
    with pytest.raises(KernelFailure, match="half way through"):
        train(optimizer, params, 1)
    monkeypatch.undo()
