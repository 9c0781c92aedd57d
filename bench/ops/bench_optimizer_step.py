"""A step of AdamW against torch's fused one with what has to go with it, and against peers.

"clip" cases measure and clip the gradients' norm too, as every training step does. Bytes: each
tensor once; the norm reads the gradients once more.
"""

from typing import NamedTuple

import pytest
import torch
from fasttrain_kernels import grad_norm
from fasttrain_kernels.ops.grad_norm.op import Tables
from fasttrain_kernels.optim import SGD, AdamW, Lion

from bench.harness import Absent, Case, Provider

LR, DECAY, MAX_NORM = 1e-4, 0.1, 1.0
F32, BF16 = torch.float32, torch.bfloat16


class Kind(NamedTuple):
    """How a model is kept and stepped, and what a step moves, in bytes a parameter."""

    name: str
    dtype: torch.dtype
    clip: bool
    bytes: float
    options: dict[str, str]
    optimizer: type = AdamW


# fp32: gradient, parameter and both moments, read, all but the gradient written: 28. With a master
# in float32 and a copy in bfloat16: 2 + 8 + 16 + 2. Codes: 1 + 1 a moment, and a scale for 256.
CODES = 4 * (1 + 4 / 256)
RANDOM = {"rounding": "stochastic"}
KINDS = [
    Kind("fp32", F32, False, 28, {}),
    Kind("fp32 clip", F32, True, 32, {}),
    Kind("bf16 master clip", BF16, True, 30, {"rounding": "master"}),
    Kind("bf16 stochastic clip", BF16, True, 24, RANDOM),
    Kind("bf16 kahan clip", BF16, True, 28, {"rounding": "kahan"}),
    Kind("fp32 8bit", F32, False, 12 + CODES, {"moments": "8bit"}),
    Kind("fp32 8bit clip", F32, True, 16 + CODES, {"moments": "8bit"}),
    Kind("bf16 stochastic 8bit clip", BF16, True, 8 + CODES, {**RANDOM, "moments": "8bit"}),
    Kind("lion bf16 stochastic clip", BF16, True, 12, {**RANDOM, "moments": "bfloat16"}, Lion),
    Kind("sgd fp32 clip", F32, True, 24, {"momentum": 0.9}, SGD),
]
COUNT = {"cpu": 50_000_000, "cuda": 1_000_000_000}


def shapes(count):
    """Matrices and vectors of a decoder, until there are `count` elements."""
    width = 4096 if count > 10**8 else 1024
    layer = [(width, width)] * 4 + [(3 * width, width)] * 3 + [(width,)] * 2
    found = []
    while count > 0:
        for shape in layer:
            size = min(count, torch.Size(shape).numel())
            if size > 0:
                found.append(shape if size == torch.Size(shape).numel() else (size,))
            count -= size
    return found


def parameters(count, dtype, device):
    """Parameters with gradients, whose norm is beyond MAX_NORM."""
    made = []
    for shape in shapes(count):
        parameter = torch.nn.Parameter(torch.full(shape, 0.02, device=device, dtype=dtype))
        parameter.grad = torch.full_like(parameter, 1e-3).uniform_(-1e-3, 1e-3)
        made.append(parameter)
    return made


def ours(kind, count, device):
    parameters_ = parameters(count, kind.dtype, device)
    options = {"max_grad_norm": MAX_NORM if kind.clip else None, **kind.options}
    return kind.optimizer(parameters_, LR, weight_decay=DECAY, **options).step


def plain(kind, count, device, **options):
    """torch's optimizer on float32, and a clip before it; bfloat16 by way of float32 masters."""
    model = parameters(count, kind.dtype, device)
    masters = model
    if kind.dtype != F32:
        masters = [torch.nn.Parameter(p.detach().float()) for p in model]
    if kind.optimizer is SGD:
        optimizer = torch.optim.SGD(masters, LR, 0.9, weight_decay=DECAY, **options)
    else:
        optimizer = torch.optim.AdamW(masters, LR, weight_decay=DECAY, **options)

    @torch.no_grad()
    def step():
        if masters is not model:
            for master, parameter in zip(masters, model, strict=True):
                master.grad = parameter.grad.float()
        if kind.clip:
            torch.nn.utils.clip_grad_norm_(masters, MAX_NORM)
        optimizer.step()
        if masters is not model:
            torch._foreach_copy_(model, masters)

    return step


def deepspeed(kind, count, device):
    """DeepSpeed's AdamW for CPUs. It clips elsewhere, so that only cases without it compare."""
    if device != "cpu" or kind.dtype != F32 or kind.clip or kind.options:
        raise Absent("steps float32 on CPUs, and doesn't clip")
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
    except ImportError as error:
        raise Absent("deepspeed is not installed") from error
    optimizer = DeepSpeedCPUAdam(
        parameters(count, kind.dtype, device), LR, weight_decay=DECAY, adamw_mode=True
    )
    return optimizer.step


def bitsandbytes(kind, count, device):
    if device != "cuda" or kind.options.get("moments") != "8bit":
        raise Absent("its 8-bit AdamW needs a GPU")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise Absent("bitsandbytes is not installed") from error
    model = parameters(count, kind.dtype, device)
    optimizer = AdamW8bit(model, LR, weight_decay=DECAY)

    def step():
        if kind.clip:
            torch.nn.utils.clip_grad_norm_(model, MAX_NORM)
        optimizer.step()

    return step


def torchao(kind, count, device):
    if kind.options.get("moments") != "8bit":
        raise Absent("compared with 8 bits only")
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise Absent("torchao is not installed") from error
    model = parameters(count, kind.dtype, device)
    stochastic = {"bf16_stochastic_round": True} if kind.dtype == BF16 else {}
    optimizer = AdamW8bit(model, LR, weight_decay=DECAY, **stochastic)

    def step():
        if kind.clip:
            torch.nn.utils.clip_grad_norm_(model, MAX_NORM)
        optimizer.step()

    return step


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.replace(" ", "-"))
def test_optimizer_step(compare, device, kind):
    count = COUNT[device]

    def provider(name, make, **options):
        return Provider(name, lambda: make(kind, count, device, **options))

    compare(
        Case("optimizer_step", f"{count // 10**6}M {kind.name}", int(kind.bytes * count)),
        [
            provider("fasttrain", ours),
            provider("torch fused", plain, fused=True),
            provider("torch foreach", plain, foreach=True),
            provider("deepspeed", deepspeed),
            provider("bitsandbytes", bitsandbytes),
            provider("torchao", torchao),
        ],
        ours="fasttrain",
        baseline="torch fused",
    )


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_grad_norm(compare, device, dtype):
    count = COUNT[device]
    gradients = [parameter.grad for parameter in parameters(count, dtype, device)]
    tables = Tables()
    name = f"{count // 10**6}M {str(dtype).removeprefix('torch.')}"
    compare(
        Case("grad_norm", name, count * dtype.itemsize),
        [
            Provider("fasttrain", lambda: lambda: grad_norm(gradients, tables=tables)),
            Provider("torch", lambda: lambda: torch.nn.utils.get_total_norm(gradients)),
        ],
        ours="fasttrain",
        baseline="torch",
    )
