"""swiglu and geglu against eager PyTorch as transformers writes it, torch.compile and Liger."""

import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels import geglu, swiglu

from bench.harness import Case, Provider, chosen_device
from bench.ops import peers

F32, BF16 = torch.float32, torch.bfloat16
# (rows, width, dtype): the inner layer of a 135M, of a 1B and of an 8B model.
CPU_CASES = [(4096, 1376, F32), (2048, 8192, F32), (4096, 1376, BF16)]
CUDA_CASES = [(16384, 1536, BF16), (16384, 8192, BF16), (16384, 14336, BF16), (16384, 8192, F32)]

OURS = {"swiglu": swiglu, "geglu": geglu}
ACTIVATION = {"swiglu": F.silu, "geglu": lambda gate: F.gelu(gate, approximate="tanh")}


def eager(op, packed):
    """As LlamaMLP and GemmaMLP in transformers, or Phi3MLP."""
    activation = ACTIVATION[op]
    return _of_halves(lambda gate, up: activation(gate) * up, packed)


def compiled(op, packed):
    torch._dynamo.reset()
    return torch.compile(eager(op, packed))


def ours(op, packed):
    return OURS[op]


def liger(op, packed):
    names = {"swiglu": "LigerSiLUMulFunction", "geglu": "LigerGELUMulFunction"}
    function = peers.liger(names[op])
    return _of_halves(function.apply, packed)


def _of_halves(call, packed):
    return (lambda projection: call(*projection.chunk(2, -1))) if packed else call


def bytes_moved(rows, width, dtype, backward):
    """gate and up in, y out; dy, gate and up in, dgate and dup out."""
    return (8 if backward else 3) * rows * width * dtype.itemsize


def steps(call, rows, width, dtype, packed, backward, device):
    """The call to time: forward, or forward and the gradients of all inputs.

    packed: gate and up are the halves of one projection, which is what gets the gradient.
    """
    generator = torch.Generator().manual_seed(0)

    def random(columns):
        return torch.randn(rows, columns, generator=generator).to(device, dtype)

    sizes = (2 * width,) if packed else (width, width)
    leaves = [random(columns).requires_grad_(backward) for columns in sizes]
    dy = random(width)

    def step():
        result = call(*leaves)
        # Not .backward(): in a model nothing accumulates into these.
        return torch.autograd.grad(result, leaves, dy) if backward else result

    return step


def pytest_generate_tests(metafunc):
    cases = CUDA_CASES if chosen_device(metafunc.config) == "cuda" else CPU_CASES
    metafunc.parametrize(("rows", "width", "dtype"), cases)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("packed", [False, True], ids=["two", "packed"])
@pytest.mark.parametrize("op", OURS)
def test_swiglu(compare, device, op, rows, width, dtype, packed, backward):
    kind = "fwd+bwd" if backward else "fwd"
    name = f"{rows}x{width} {str(dtype).removeprefix('torch.')}"
    name += f"{' packed' if packed else ''} {kind}"

    def provider(name, make):
        call_shape = (rows, width, dtype, packed, backward, device)
        return Provider(name, lambda: steps(make(op, packed), *call_shape))

    compare(
        Case(op, name, bytes_moved(rows, width, dtype, backward)),
        [
            provider("fasttrain", ours),
            provider("eager", eager),
            provider("torch.compile", compiled),
            provider("liger-kernel", liger),
        ],
        ours="fasttrain",
        baseline="eager",
    )
