"""The optimizers' state: saved, loaded, copied, laid out otherwise; and what is refused."""

import copy
import io
import math

import pytest
import torch
from fasttrain_kernels.optim import SGD, AdamW, GradientRelease, Muon
from optim_steps import (
    BF16,
    FEW,
    OURS,
    give_gradients,
    largest_difference,
    parameters,
    train,
    values,
)
from torch import nn


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("rounding", ["master", "stochastic", "kahan"])
@pytest.mark.parametrize("moments", ["float32", "bfloat16", "8bit"])
def test_save_and_load_in_the_middle_goes_on_with_the_same_bits(name, rounding, moments):
    kind, options = OURS[name]
    options = {**options, "rounding": rounding, "moments": moments}
    params = parameters(BF16)
    optimizer = kind(params, 1e-2, **options)
    train(optimizer, params, 3)
    file = io.BytesIO()
    torch.save({"values": values(params), "optimizer": optimizer.state_dict()}, file)
    train(optimizer, params, 3, start=3)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again = [nn.Parameter(value) for value in saved["values"]]
    other = kind(again, 0.5)  # what was saved goes before
    other.load_state_dict(saved["optimizer"])
    train(other, again, 3, start=3)
    assert all(map(torch.equal, values(params), values(again)))
    for mine, theirs in zip(params, again, strict=True):
        state, loaded = optimizer.state[mine], other.state[theirs]
        assert state.keys() == loaded.keys()
        assert all(
            torch.equal(state[k], loaded[k]) and state[k].dtype == loaded[k].dtype for k in state
        )


def test_what_torchs_adamw_saved_can_be_gone_on_with():
    params = parameters()
    theirs = torch.optim.AdamW(params, 1e-3, weight_decay=0.1)
    train(theirs, params, 3)
    again = [nn.Parameter(value) for value in values(params)]
    ours = AdamW(again, 0.5)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    train(theirs, params, 3, start=3)
    train(ours, again, 3, start=3)
    assert largest_difference(values(params), values(again)) < 1e-6


def test_other_layouts_of_memory():
    base = torch.randn(6, 5, 4, 4)
    layouts = [
        base.to(memory_format=torch.channels_last),
        torch.randn(9, 7).t(),
        torch.randn(9, 14)[:, ::2],  # with gaps
        torch.randn(101)[1:],  # not aligned
    ]
    mine = [nn.Parameter(layout) for layout in layouts]
    theirs = [
        nn.Parameter(layout.clone(memory_format=torch.contiguous_format)) for layout in layouts
    ]
    ours = AdamW(mine, 1e-2, max_grad_norm=1.0)
    torchs = torch.optim.AdamW(theirs, 1e-2)
    for step in range(5):
        give_gradients(theirs, step)
        for a, b in zip(mine, theirs, strict=True):
            a.grad = b.grad.clone()  # contiguous, whatever the parameter is
        ours.step()
        nn.utils.clip_grad_norm_(theirs, 1.0)
        torchs.step()
    assert largest_difference(values(mine), values(theirs)) < 1e-6


def twice(optimizer):
    """A copy of an optimizer, and what torch.load makes of the file of one."""
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return copy.deepcopy(optimizer), torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", OURS)
def test_copies_go_on_as_the_optimizer_does(name):
    kind, options = OURS[name]
    params = parameters(BF16, FEW)
    optimizer = kind(params, 0.1, max_grad_norm=0.5, seed=7, rounding="stochastic", **options)
    optimizer.declare_slice(params[0], tensor=9, offset=512)
    train(optimizer, params, 2)
    copies = twice(optimizer)
    train(optimizer, params, 2, start=2)
    for other in copies:
        own = other.param_groups[0]["params"]
        train(other, own, 2, start=2)
        assert all(torch.equal(a, b) for a, b in zip(own, params, strict=True))


def test_copies_of_muon_go_on_as_it_does():
    params = parameters(BF16, [(30, 77), (5, 8)])
    optimizer = Muon(params, 0.1, max_grad_norm=0.5, newton_schulz_backend="eager")
    train(optimizer, params, 2)
    copies = twice(optimizer)
    train(optimizer, params, 2, start=2)
    for other in copies:
        own = other.param_groups[0]["params"]
        train(other, own, 2, start=2)
        assert other.newton_schulz_backend == "eager"
        assert all(torch.equal(a, b) for a, b in zip(own, params, strict=True))


def test_what_torchs_adamw_saved_of_bf16_becomes_float32_moments():
    """They are read by their addresses: as they were, a kernel would read beyond them."""
    theirs, params = parameters(BF16, FEW), parameters(BF16, FEW)
    torchs = torch.optim.AdamW(theirs, 1e-3)
    train(torchs, theirs, 2)
    saved = torchs.state_dict()
    for state in saved["state"].values():
        state["step"] = int(state["step"])  # as it was before torch 1.12
    ours = AdamW(params, 1e-3)
    ours.load_state_dict(saved)
    train(ours, params, 1, start=2)
    state, old = ours.state[params[0]], torchs.state[theirs[0]]["exp_avg"]
    expected = old.float() + 0.1 * (params[0].grad.float() - old.float())
    assert state["step"] == 3
    torch.testing.assert_close(state["exp_avg"], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("before", "after"), [("float32", "8bit"), ("8bit", "float32")])
def test_moments_of_another_kind_are_refused(before, after):
    params = parameters(shapes=FEW)
    optimizer = AdamW(params, 1e-3, moments=before)
    train(optimizer, params, 1)
    optimizer.param_groups[0]["moments"] = after
    with pytest.raises(ValueError, match=r"exp_avg of a parameter of shape \(30, 77\)"):
        train(optimizer, params, 1)


def test_scales_of_another_slice_are_refused():
    params = parameters(shapes=[(300,)])
    optimizer = AdamW(params, 1e-3, moments="8bit")
    train(optimizer, params, 1)
    optimizer.declare_slice(params[0], tensor=0, offset=250)
    with pytest.raises(ValueError, match="is for 2 blocks; expected 3"):
        train(optimizer, params, 1)


def test_a_layout_that_changes_between_steps_takes_the_state_along():
    values_of = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    mine = [nn.Parameter(values_of.to(memory_format=torch.channels_last))]
    theirs = [nn.Parameter(values_of.clone())]
    ours, torchs = AdamW(mine, 1e-2), torch.optim.AdamW(theirs, 1e-2)
    train(ours, mine, 2)
    train(torchs, theirs, 2)
    mine[0].data = mine[0].data.contiguous()
    train(ours, mine, 2, start=2)
    train(torchs, theirs, 2, start=2)
    assert largest_difference(mine, theirs) < 1e-6


def test_a_norm_that_no_step_went_by_is_forgotten():
    params = parameters(shapes=FEW)
    optimizer = AdamW(params, 1e-3, max_grad_norm=1.0)
    give_gradients(params, 0, scale=float("nan"))
    optimizer.measure()
    optimizer.zero_grad()
    train(optimizer, params, 1)
    assert optimizer.grad_norm.isfinite()


@pytest.mark.parametrize(
    ("options", "dtype", "message"),
    [
        ({"rounding": "stochastic"}, torch.float16, "is for bfloat16"),
        ({"moments": "8bit"}, torch.float64, "are of float32"),
        ({"betas": (0.9,)}, torch.float32, "expected two numbers"),
        ({"max_grad_norm": math.nan}, torch.float32, "expected more than 0"),
    ],
)
def test_options_that_do_not_fit_are_refused_at_once(options, dtype, message):
    with pytest.raises(ValueError, match=message):
        AdamW(parameters(dtype, FEW), **options)


def test_gradient_release_keeps_as_many_norms_as_parameters():
    layer = nn.Linear(3, 2)
    asked, unasked = (copy.deepcopy(layer) for _ in range(2))
    releases = [GradientRelease(SGD(model.parameters(), 0.0)) for model in (asked, unasked)]
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    squares = 0.0
    for _ in range(5):
        asked(x).sum().backward()
        unasked(x).sum().backward()
        squares += float(releases[0].norm()) ** 2
    assert len(releases[1]._norms) <= 2
    assert float(releases[1].norm()) == pytest.approx(math.sqrt(squares), rel=1e-6)


def test_a_schedule_moves_rates_and_betas_of_each_group_as_torchs():
    mine, theirs = parameters(shapes=FEW), parameters(shapes=FEW)
    ends = []
    for kind, params in ((AdamW, mine), (torch.optim.AdamW, theirs)):
        optimizer = kind([{"params": params[:1]}, {"params": params[1:]}], lr=0.1)
        rates = [0.1, 0.01]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=10)
        for step in range(8):
            train(optimizer, params, 1, start=step)
            schedule.step()
        ends.append([(group["lr"], group["betas"]) for group in optimizer.param_groups])
    assert ends[0] == ends[1]
    assert largest_difference(mine, theirs) < 1e-6


# --- what is drawn for random rounding ------------------------------------------------------------


def test_random_rounding_follows_the_seed():
    ends = []
    for seed in (0, 0, 1):
        params = parameters(BF16, [(300,)])
        train(SGD(params, 1e-3, rounding="stochastic", seed=seed), params, 1)
        ends.append(values(params)[0])
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_each_tensor_draws_bits_of_its_own_whether_or_not_others_have_gradients():
    params = [nn.Parameter(torch.ones(300, dtype=BF16)) for _ in range(4)]
    for parameter in params:
        parameter.grad = torch.full_like(parameter, 0.3)
    params[2].grad = None
    SGD(params[:2], 1e-2, rounding="stochastic").step()
    SGD([params[2], params[3]], 1e-2, rounding="stochastic").step()
    assert not torch.equal(params[0], params[1])
    assert torch.equal(params[1], params[3])


# --- options and numbers at their ends ------------------------------------------------------------


def test_learning_rates_that_are_tensors_are_their_groups():
    mine, theirs = parameters(shapes=FEW), parameters(shapes=FEW)
    for kind, params, rate in ((SGD, mine, torch.tensor), (torch.optim.SGD, theirs, float)):
        groups = [{"params": params[:1], "lr": rate(0.1)}, {"params": params[1:], "lr": rate(0.3)}]
        train(kind(groups), params, 1)
    assert largest_difference(mine, theirs) < 1e-6


@pytest.mark.parametrize("name", OURS)
def test_maximize_is_a_step_by_the_opposite_gradient(name):
    kind, options = OURS[name]
    up, down = parameters(shapes=FEW), parameters(shapes=FEW)
    give_gradients(up, 0)
    give_gradients(down, 0, scale=-1.0)
    kind(up, 0.1, maximize=True, **options).step()
    kind(down, 0.1, **options).step()
    assert largest_difference(up, down) == 0


def test_gradient_release_passes_over_frozen_parameters():
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    GradientRelease(SGD(layer.parameters(), 0.1))
    before = values(layer.parameters())
    layer(torch.ones(4, 3)).sum().backward()
    after = values(layer.parameters())
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, True]


def test_after_gradient_release_norms_are_of_gradients_again():
    params = parameters(shapes=[(5,)])
    optimizer = SGD(params, 0.1)
    GradientRelease(optimizer).remove()
    params[0].grad = torch.full((5,), 2.0)
    assert optimizer.measure().item() == pytest.approx(math.sqrt(20))


def test_codes_of_the_largest_numbers_have_a_scale():
    parameter = nn.Parameter(torch.zeros(5))
    parameter.grad = torch.full((5,), 3e38)
    optimizer = SGD([parameter], 1e-38, momentum=0.9, moments="8bit")
    optimizer.step()
    assert optimizer.state[parameter]["momentum_buffer_scale"].isfinite().all()


def test_what_is_not_a_number_stays_so_when_it_is_rounded_at_random():
    """With all bits set it would become a zero by an addition to its bits."""
    parameter = nn.Parameter(torch.zeros(300, dtype=BF16))
    parameter.main_grad = torch.full((300,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    SGD([parameter], 1.0, rounding="stochastic").step()
    assert parameter.isnan().all()
