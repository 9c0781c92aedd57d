"""Parameters, gradients and steps for tests of fasttrain_kernels.optim."""

import torch
from fasttrain_kernels.optim import SGD, AdamW, Lion
from torch import nn

BF16 = torch.bfloat16
# Odd sizes, several blocks of 256, a scalar, nothing at all; over a unit of work.
SHAPES = [(30, 77), (1000,), (), (0,), (129, 130)]
FEW = [(30, 77), (5,), ()]  # for what is slow
OURS = {
    "adamw": (AdamW, {"weight_decay": 0.1}),
    "lion": (Lion, {"weight_decay": 0.1}),
    "sgd": (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
}


def parameters(dtype=torch.float32, shapes=SHAPES):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def give_gradients(params, step, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    for parameter in params:
        drawn = torch.randn(parameter.shape, generator=generator) * scale
        parameter.grad = drawn.to(parameter.dtype)


def train(optimizer, params, steps, start=0):
    for step in range(start, start + steps):
        give_gradients(params, step)
        optimizer.step()


def largest_difference(ones, others):
    pairs = zip(ones, others, strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs if a.numel() > 0)


def values(params):
    return [parameter.detach().clone() for parameter in params]
