"""fasttrain's own optimizers as the trainer makes them, in each precision."""

import pytest
import torch
from fasttrain_kernels.optim import SGD, AdamW, Lion
from torch import nn

from fasttrain.config.errors import UserError
from fasttrain.config.registry import OPTIMIZERS
from fasttrain.core.interfaces import ClippingOptimizer
from fasttrain.core.kernel_plan import OPTIMIZER, KernelPlan, KernelSite
from fasttrain.core.parameter_groups import parameter_groups
from fasttrain.runtime.precision import choose_precision

CPU = torch.device("cpu")
CLASSES = {"adamw": AdamW, "lion": Lion, "sgd": SGD}


def build(name, *, precision="fp32", plan=None, **options):
    chosen = choose_precision(precision, CPU, optimizer_keeps_masters=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).to(chosen.parameters)
    config = OPTIMIZERS.config(name)(**options)
    factory = OPTIMIZERS.component(name)(config)
    groups = parameter_groups(model, config)
    return model, factory.build(groups, plan=plan or KernelPlan(), precision=chosen)


def step(model, optimizer):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return [optimizer.state[parameter] for parameter in model.parameters()]


@pytest.mark.parametrize("name", CLASSES)
def test_an_optimizer_of_ours_that_clips_and_skips_by_itself(name):
    model, optimizer = build(name, learning_rate=3e-4, weight_decay=0.1)
    assert type(optimizer) is CLASSES[name]
    assert isinstance(optimizer, ClippingOptimizer)
    assert optimizer.defaults["fused"]  # the engine tells it on the device what to skip
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {group["lr"] for group in optimizer.param_groups} == {3e-4}
    assert len(step(model, optimizer)) == 6


@pytest.mark.parametrize(
    ("precision", "options", "kept"),
    [
        ("fp32", {}, set()),
        ("fp32", {"rounding": "kahan"}, set()),
        ("bf16-mixed", {}, {"master"}),
        ("bf16", {}, set()),
        ("bf16", {"rounding": "kahan"}, {"compensation"}),
    ],
)
def test_what_each_precision_keeps(precision, options, kept):
    model, optimizer = build("adamw", precision=precision, **options)
    for parameter, state in zip(model.parameters(), step(model, optimizer), strict=True):
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"} | kept
        assert state["exp_avg"].dtype == torch.float32
        for name in kept:
            dtype = torch.float32 if name == "master" else torch.bfloat16
            assert state[name].dtype == dtype
            assert state[name].shape == parameter.shape


def test_moments_of_8_bits_take_a_quarter():
    model, optimizer = build("adamw", moments="8bit")
    for parameter, state in zip(model.parameters(), step(model, optimizer), strict=True):
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8
        assert state["exp_avg"].shape == parameter.shape
        assert state["exp_avg_scale"].shape == (1,)


def test_without_momentum_sgd_keeps_only_its_count():
    model, optimizer = build("sgd", momentum=0.0)
    assert all(set(state) == {"step"} for state in step(model, optimizer))


def test_kernels_are_those_of_the_plan():
    sites = (
        KernelSite(OPTIMIZER, "optimizer_step", "eager"),
        KernelSite(OPTIMIZER, "grad_norm", "cpu", fixed=True),
    )
    _, optimizer = build("adamw", plan=KernelPlan(sites))
    assert (optimizer.backend, optimizer.norm_backend) == ("eager", "cpu")
    _, optimizer = build("adamw")
    assert (optimizer.backend, optimizer.norm_backend) == ("auto", "auto")


def test_muon_steps_hidden_matrices_and_says_so():
    options = {"learning_rate": 1e-3, "adamw_learning_rate": 1e-4, "weight_decay": 0.1}
    model, optimizer = build("muon", **options)
    assert [(g["name"], g["muon"], g["lr"]) for g in optimizer.param_groups] == [
        ("matrices (Muon)", True, 1e-3),
        ("vectors (AdamW)", False, 1e-4),
    ]
    assert optimizer.describe().startswith("Muon on 2 parameters of 56 elements, AdamW on 4")
    states = step(model, optimizer)
    assert [set(state) for state in states[:2]] == [
        {"step", "momentum_buffer"},
        {"step", "exp_avg", "exp_avg_sq"},
    ]


def test_a_rules_own_rate_stands_beside_that_of_muons_adamw():
    rules = [
        {"match": "1.*", "learning_rate": 5e-4},
        {"match": "0.bias", "learning_rate_scale": 0.5},
    ]
    options = {"learning_rate": 1e-3, "adamw_learning_rate": 1e-4, "rules": rules}
    _, optimizer = build("muon", **options)
    rates = {g["name"]: g["lr"] for g in optimizer.param_groups}
    assert rates == pytest.approx(
        {
            "matrices (Muon)": 1e-3,
            "vectors (AdamW)": 1e-4,
            "vectors · 1.* (AdamW)": 5e-4,
            "vectors · 0.bias (AdamW)": 5e-5,
        }
    )


def test_muon_on_nothing_is_refused():
    config = OPTIMIZERS.config("muon")()
    groups = parameter_groups(nn.Linear(1, 5), config)
    factory = OPTIMIZERS.component("muon")(config)
    with pytest.raises(UserError, match="muon would step no parameter"):
        factory.build(groups, plan=KernelPlan(), precision=choose_precision("fp32", CPU))


def test_masters_have_one_owner():
    for keeps, weights in ((True, torch.bfloat16), (False, torch.float32)):
        precision = choose_precision("bf16-mixed", CPU, optimizer_keeps_masters=keeps)
        assert (precision.parameters, precision.masters) == (weights, keeps)
        assert precision.activations == torch.bfloat16
        assert ("masters in the optimizer" in precision.reason) == keeps
    assert not choose_precision("bf16", CPU, optimizer_keeps_masters=True).masters
