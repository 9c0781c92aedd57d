"""Optimizers of torch and of other packages: what the factory asks for, and what they keep."""

import pytest
import torch
from torch import nn

from fasttrain.config.schema.optimizer import (
    AdafactorConfig,
    BitsandbytesAdamWConfig,
    ScheduleFreeAdamWConfig,
    TorchaoAdamWConfig,
)
from fasttrain.core.kernel_plan import KernelPlan
from fasttrain.core.parameter_groups import parameter_groups
from fasttrain.optimizer.adafactor import AdafactorFactory
from fasttrain.optimizer.bitsandbytes_adamw import BitsandbytesAdamWFactory
from fasttrain.optimizer.schedule_free import ScheduleFreeAdamWFactory
from fasttrain.optimizer.torchao_adamw import TorchaoAdamWFactory
from fasttrain.runtime.precision import choose_precision

FP32 = choose_precision("fp32", torch.device("cpu"))
RATE, DECAY = 0.01, 0.1


def small_model(width=7):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width), nn.LayerNorm(width))


def build(factory, config, model):
    groups = parameter_groups(model, config)
    optimizer = factory(config).build(groups, plan=KernelPlan(), precision=FP32)
    assert [group["name"] for group in optimizer.param_groups] == ["matrices", "vectors"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [DECAY, 0.0]
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([RATE] * 2)
    return optimizer


def step(model, optimizer, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def assert_same_weights(model, other):
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_adafactor_is_that_of_torch_with_rows_and_columns_of_matrices():
    model, reference = small_model(), small_model()
    config = AdafactorConfig(
        learning_rate=RATE, weight_decay=DECAY, beta2_decay=-0.7, clip_threshold=1.5, min_scale=0.2
    )
    optimizer = build(AdafactorFactory, config, model)
    matrix, *vectors = reference.parameters()
    groups = [{"params": [matrix], "weight_decay": DECAY}, {"params": vectors}]
    theirs = torch.optim.Adafactor(groups, lr=RATE, beta2_decay=-0.7, eps=(None, 0.2), d=1.5)
    for seed in range(3):
        step(model, optimizer, seed), step(reference, theirs, seed)
    assert_same_weights(model, reference)
    state = optimizer.state[model[0].weight]
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "step": (), "row_var": (7, 1), "col_var": (1, 5),
    }  # fmt: skip


def test_schedule_free_is_in_its_training_mode_and_keeps_what_it_says():
    schedulefree = pytest.importorskip("schedulefree")
    model, reference = small_model(), small_model()
    config = ScheduleFreeAdamWConfig(
        learning_rate=RATE, weight_decay=DECAY, betas=(0.8, 0.95), eps=1e-6
    )
    optimizer = build(ScheduleFreeAdamWFactory, config, model)
    matrix, *vectors = reference.parameters()
    groups = [{"params": [matrix], "weight_decay": DECAY}, {"params": vectors}]
    theirs = schedulefree.AdamWScheduleFree(groups, lr=RATE, betas=(0.8, 0.95), eps=1e-6)
    theirs.train()
    for seed in range(3):
        step(model, optimizer, seed), step(reference, theirs, seed)
    assert_same_weights(model, reference)
    assert set(optimizer.state[model[0].weight]) == {"z", "exp_avg_sq"}
    assert all(group["train_mode"] and group["k"] == 3 for group in optimizer.param_groups)


@pytest.mark.parametrize("bits", [8, 32])
def test_bitsandbytes_keeps_moments_of_so_many_bits(bits):
    pytest.importorskip("bitsandbytes")
    model = small_model(width=1024)
    config = BitsandbytesAdamWConfig(learning_rate=RATE, weight_decay=DECAY, bits=bits)
    optimizer = build(BitsandbytesAdamWFactory, config, model)
    step(model, optimizer)
    large, small = (optimizer.state[p] for p in (model[0].weight, model[0].bias))
    assert large["state1"].dtype is {8: torch.uint8, 32: torch.float32}[bits]
    assert small["state1"].dtype is torch.float32
    assert large["step"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4, "fp8"])
def test_torchao_keeps_moments_of_so_many_bits(bits):
    optim = pytest.importorskip("torchao.optim")
    model = small_model(width=1024)
    config = TorchaoAdamWConfig(learning_rate=RATE, weight_decay=DECAY, bits=bits)
    optimizer = build(TorchaoAdamWFactory, config, model)
    assert type(optimizer) is {
        8: optim.AdamW8bit, 4: optim.AdamW4bit, "fp8": optim.AdamWFp8,
    }[bits]  # fmt: skip
    before = model[0].weight.detach().clone()
    step(model, optimizer)
    moved = (model[0].weight - before).abs()
    assert 0 < moved.max() < 2 * RATE
