"""rms_norm against eager PyTorch as transformers writes it, F.rms_norm, torch.compile and Liger."""

import pytest
import torch
from fasttrain_kernels import rms_norm

from bench.harness import Case, Provider, chosen_device
from bench.ops import peers

EPS = 1e-6
F32, BF16 = torch.float32, torch.bfloat16
# (rows, width, dtype): hidden states of a small and of a 7B model; heads under QK-norm.
CPU_CASES = [
    (4096, 512, F32),
    (8192, 1024, F32),
    (4096, 4096, F32),
    (32768, 128, F32),
    (8192, 1024, BF16),
]
CUDA_CASES = [
    (16384, 1024, BF16),
    (16384, 4096, BF16),
    (16384, 8192, BF16),
    (524288, 128, BF16),
    (16384, 4096, F32),
]


def eager(x, weight, residual):
    """As LlamaRMSNorm in transformers, with the residual added before it."""
    total = x if residual is None else x + residual
    wide = total.float()
    normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    y = weight * normalized.to(total.dtype)
    return y if residual is None else (y, total)


def builtin(x, weight, residual):
    total = x if residual is None else x + residual
    y = torch.nn.functional.rms_norm(total, weight.shape, weight, EPS)
    return y if residual is None else (y, total)


def liger():
    function = peers.liger("LigerRMSNormFunction")

    def call(x, weight, residual):
        total = x if residual is None else x + residual
        y = function.apply(total, weight, EPS, 0.0, "llama", False)
        return y if residual is None else (y, total)

    return call


def bytes_moved(rows, width, dtype, has_residual, backward):
    """x in, y out; dy, x in, dx out; a residual adds itself, the sum and the sum's gradient."""
    tensors = (4 if has_residual else 2) + ((4 if has_residual else 3) if backward else 0)
    per_row = 4 * (2 if backward else 1)  # rstd
    return tensors * rows * width * dtype.itemsize + rows * per_row


def steps(call, rows, width, dtype, has_residual, backward, device):
    """The call to time: forward, or forward and the gradients of all inputs."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(backward)

    x, weight = random(rows, width), random(width)
    residual = random(rows, width) if has_residual else None
    grads = [random(rows, width).detach() for _ in range(2 if has_residual else 1)]

    leaves = [tensor for tensor in (x, weight, residual) if tensor is not None]

    def step():
        result = call(x, weight, residual)
        # Not .backward(): in a model nothing accumulates into the norm's inputs.
        return torch.autograd.grad(result, leaves, grads) if backward else result

    return step


def pytest_generate_tests(metafunc):
    cases = CUDA_CASES if chosen_device(metafunc.config) == "cuda" else CPU_CASES
    metafunc.parametrize(("rows", "width", "dtype"), cases)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("has_residual", [False, True], ids=["plain", "residual"])
def test_rms_norm(compare, device, rows, width, dtype, has_residual, backward):
    kind = "fwd+bwd" if backward else "fwd"
    name = f"{rows}x{width} {str(dtype).removeprefix('torch.')}"
    name += f"{' +residual' if has_residual else ''} {kind}"
    shape = (rows, width, dtype, has_residual, backward)

    def provider(name, make):
        return Provider(name, lambda: steps(make(), *shape, device))

    def ours(x, weight, residual):
        return rms_norm(x, weight, EPS, residual=residual)

    def compiled():
        torch._dynamo.reset()
        return torch.compile(eager)

    compare(
        Case("rms_norm", name, bytes_moved(*shape)),
        [
            provider("fasttrain", lambda: ours),
            provider("eager", lambda: eager),
            provider("F.rms_norm", lambda: builtin),
            provider("torch.compile", compiled),
            provider("liger-kernel", liger),
        ],
        ours="fasttrain",
        baseline="eager",
    )
