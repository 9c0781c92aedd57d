"""rope against eager PyTorch as transformers writes it, torch.compile and Liger."""

import pytest
import torch
from fasttrain_kernels import rope, rope_table

from bench.harness import Absent, Case, Provider, chosen_device
from bench.ops import peers

EPS = 1e-6
F32, BF16 = torch.float32, torch.bfloat16
# (tokens, query heads, key heads, head dim, dtype): small models with and without grouped keys; the
# heads of an 8B and of a 70B model.
CPU_CASES = [
    (4096, 8, 8, 64, F32),
    (4096, 16, 2, 128, F32),
    (128, 8, 8, 64, F32),
    (4096, 8, 8, 64, BF16),
]
CUDA_CASES = [
    (16384, 32, 8, 128, BF16),
    (16384, 64, 8, 128, BF16),
    (16384, 16, 16, 64, BF16),
    (16384, 32, 8, 128, F32),
]
KINDS = ("half", "interleaved", "norm")  # norm: of queries and keys, then halves


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def rotate_neighbours(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def normalized(x, weight):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def eager(kind):
    """As apply_rotary_pos_emb of Llama and Cohere 2, and as Qwen 3 does after its norms."""
    rotate = rotate_neighbours if kind == "interleaved" else rotate_half

    def call(q, k, cos, sin, *weights):
        if weights:
            q, k = map(normalized, (q, k), weights)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        cos, sin = cos[:, None], sin[:, None]
        return q * cos + rotate(q) * sin, k * cos + rotate(k) * sin

    return call


def compiled(kind):
    torch._dynamo.reset()
    return torch.compile(eager(kind))


def ours(kind):
    style = "interleaved" if kind == "interleaved" else "half"

    def call(q, k, cos, sin, *weights):
        norms = dict(zip(("q_norm", "k_norm"), weights, strict=bool(weights)))
        return rope(q[0], k[0], table=(cos, sin), style=style, eps=EPS, **norms)

    return call


def liger(kind):
    function = peers.liger("LigerRopeFunction")
    if kind != "half":
        raise Absent("liger-kernel's rope turns halves, and norms nothing")

    def call(q, k, cos, sin):
        # In place, and its backward too: it is given copies, as eager and ours keep their inputs.
        heads = (x.transpose(1, 2).clone() for x in (q, k))
        return function.apply(*heads, cos, sin)

    return call


def bytes_moved(tokens, q_heads, k_heads, head_dim, dtype, kind, backward):
    """Heads in and out, and their gradients; with a norm the heads again; the table each time."""
    heads = tokens * (q_heads + k_heads) * head_dim * dtype.itemsize
    passes = (2 + (3 if kind == "norm" else 2)) if backward else 2
    return passes * heads + (2 if backward else 1) * tokens * head_dim * F32.itemsize


def steps(provider, make, shape, kind, backward, device):
    """The call to time: forward, or forward and the gradients of all inputs."""
    tokens, q_heads, k_heads, head_dim, dtype = shape
    call = make(kind)
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(backward)

    heads = [random(1, tokens, count, head_dim) for count in (q_heads, k_heads)]
    weights = [random(head_dim) for _ in range(2)] if kind == "norm" else []
    grads = [torch.randn_like(x.detach()) for x in heads]
    inv_freq = 1e4 ** -(torch.arange(0, head_dim, 2, device=device) / head_dim)
    cos, sin = rope_table(torch.arange(tokens, device=device), inv_freq)
    if provider == "fasttrain":
        grads = [grad[0] for grad in grads]
    else:  # a whole row for each token, in the heads' dtype
        grads = [grad.transpose(1, 2) for grad in grads]
        repeat = torch.Tensor.repeat_interleave if kind == "interleaved" else torch.Tensor.repeat
        cos, sin = (
            (repeat(part, 2, -1) if kind == "interleaved" else repeat(part, 1, 2))[None].to(dtype)
            for part in (cos, sin)
        )

    def step():
        result = call(*heads, cos, sin, *weights)
        return torch.autograd.grad(result, [*heads, *weights], grads) if backward else result

    return step


def pytest_generate_tests(metafunc):
    cases = CUDA_CASES if chosen_device(metafunc.config) == "cuda" else CPU_CASES
    metafunc.parametrize("shape", cases, ids=lambda shape: "x".join(map(str, shape[:4])))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("kind", KINDS)
def test_rope(compare, device, shape, kind, backward):
    tokens, q_heads, k_heads, head_dim, dtype = shape
    name = f"{tokens}x({q_heads}+{k_heads})x{head_dim} {str(dtype).removeprefix('torch.')}"
    name += f"{'' if kind == 'half' else f' {kind}'} {'fwd+bwd' if backward else 'fwd'}"

    def provider(name, make):
        return Provider(name, lambda: steps(name, make, shape, kind, backward, device))

    compare(
        Case("rope", name, bytes_moved(*shape, kind, backward)),
        [
            provider("fasttrain", ours),
            provider("eager", eager),
            provider("torch.compile", compiled),
            provider("liger-kernel", liger),
        ],
        ours="fasttrain",
        baseline="eager",
    )
