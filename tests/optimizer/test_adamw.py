"""AdamW against its formula."""

import torch
from torch import nn

from fasttrain.config.schema.optimizer import AdamWConfig
from fasttrain.core.kernel_plan import KernelPlan
from fasttrain.core.parameter_groups import parameter_groups
from fasttrain.optimizer.adamw import AdamWFactory
from fasttrain.runtime.precision import choose_precision

FP32 = choose_precision("fp32", torch.device("cpu"))


def build(model, **options):
    config = AdamWConfig(**options)
    groups = parameter_groups(model, config)
    return AdamWFactory(config).build(groups, plan=KernelPlan(), precision=FP32)


def small_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).to(dtype)


def test_steps_follow_the_formula():
    model = small_model(torch.float64)
    lr, decay, (beta1, beta2), eps = 1e-2, 0.1, (0.8, 0.95), 1e-6
    optimizer = build(model, learning_rate=lr, weight_decay=decay, betas=(beta1, beta2), eps=eps)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in range(1, 6):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            p, g = expected[name], parameter.grad
            if p.dim() == 2:
                p *= 1 - lr * decay
            first[name] = beta1 * first[name] + (1 - beta1) * g
            second[name] = beta2 * second[name] + (1 - beta2) * g * g
            mean = first[name] / (1 - beta1**step)
            root = (second[name] / (1 - beta2**step)).sqrt()
            p -= lr * mean / (root + eps)
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-12, atol=1e-12)


def test_groups_keep_their_names_and_decay():
    model = small_model()
    optimizer = build(model, learning_rate=3e-4, weight_decay=0.1)
    matrices, vectors = optimizer.param_groups
    assert (matrices["name"], matrices["weight_decay"], matrices["lr"]) == ("matrices", 0.1, 3e-4)
    assert (vectors["name"], vectors["weight_decay"]) == ("vectors", 0.0)
    assert matrices["param_names"] == ["0.weight", "2.weight"]
