"""packed_attention against PyTorch's attention, a call for each document, masked over the whole
batch and on a padded batch, and against the kernels of others that it can use.

A case's FLOPs are those of the scores that are seen: documents of n tokens have n (n + 1) / 2 each.
The mask and the padding compute others as well.
"""

import functools
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels import DocumentLayout, UnsupportedKernel, packed_attention
from torch.nn.utils.rnn import pad_sequence

from bench.harness import H200_COPY, H200_MATMUL, Absent, Case, Provider, chosen_device

F32, BF16 = torch.float32, torch.bfloat16
MIXED = 0  # in place of a length

# The share of its matrix products' speed that attention should reach on an H200: what
# FlashAttention 3 is known for, less what Triton loses.
FORWARD_SHARE, BACKWARD_SHARE = 0.60, 0.45
BACKWARD = 2.5  # times the FLOPs of the forward pass: five products instead of two


class Shape(NamedTuple):
    tokens: int
    query_heads: int
    key_heads: int
    width: int
    dtype: torch.dtype
    document: int  # tokens of each; MIXED: as conversations have

    def __str__(self):
        length = "mix" if self.document == MIXED else f"x {self.document}"
        heads = f"{self.query_heads}/{self.key_heads} heads of {self.width}"
        return f"{self.tokens} {length}, {heads}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def lengths(self):
        if self.document == MIXED:
            return mixed(self.tokens)
        return (self.document,) * (self.tokens // self.document)

    @property
    def forward_flops(self):
        seen = sum(n * (n + 1) // 2 for n in self.lengths)
        return 4 * self.width * self.query_heads * seen

    def bytes(self, backward):
        """q, k, v in, o and lse out; do, q, k, v, o and lse in, dq, dk, dv out."""
        values = 2 * (self.query_heads + self.key_heads) * self.width * self.dtype.itemsize
        statistics = 4 * self.query_heads
        return self.tokens * (3 * values + 2 * statistics if backward else values + statistics)

    def h200_seconds(self, backward):
        """What an H200 should take: FLOPs at the shares above, or bytes where they take longer."""
        if self.dtype != BF16:
            return None
        rate, moved = H200_MATMUL, self.bytes(False) / H200_COPY
        seconds = max(moved, self.forward_flops / (FORWARD_SHARE * rate))
        if backward:
            again = (self.bytes(True) - self.bytes(False)) / H200_COPY
            seconds += max(again, BACKWARD * self.forward_flops / (BACKWARD_SHARE * rate))
        return seconds


CPU_SHAPES = [
    *(Shape(4096, 8, 8, 64, F32, document) for document in (64, 512, 4096, MIXED)),
    Shape(4096, 8, 8, 64, BF16, MIXED),
]
CUDA_SHAPES = [
    Shape(16384, 32, 8, 128, BF16, document) for document in (128, 512, 2048, 16384, MIXED)
]


@functools.cache
def mixed(tokens):
    """Lengths as conversations have them: lognormal, half below 136, a tenth above 440, to 1500."""
    generator = torch.Generator().manual_seed(0)
    spread = math.log(440 / 136) / 1.2816  # the 90th percentile of a normal distribution
    found = []
    while sum(found) < tokens:
        drawn = 136 * math.exp(spread * float(torch.randn((), generator=generator)))
        found.append(min(max(1, round(drawn)), 1500, tokens - sum(found)))
    return tuple(found)


# ---- peers: functions (q, k, v) (T, H, D) -> (T, Hq, D), made for a layout -----------------------


def as_heads(tensor):
    """(T, H, D) -> (1, H, T, D)."""
    return tensor.transpose(0, 1)[None]


def attend(q, k, v, **options):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)


def each_document(layout, device):
    def call(q, k, v):
        documents = zip(*(t.split(layout.lengths) for t in (q, k, v)), strict=True)
        return torch.cat(
            [attend(*map(as_heads, one), is_causal=True)[0].transpose(0, 1) for one in documents]
        )

    return call


def masked(layout, device):
    tokens = sum(layout.lengths)
    numbers = torch.arange(len(layout.lengths), device=device)
    document = numbers.repeat_interleave(torch.tensor(layout.lengths, device=device))
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    mask &= document[:, None] == document[None, :]

    def call(q, k, v):
        return attend(*map(as_heads, (q, k, v)), attn_mask=mask)[0].transpose(0, 1)

    return call


def padded(layout, device):
    """With the copies into the padded batch and out of it, which are part of this way."""
    lengths = torch.tensor(layout.lengths, device=device)
    kept = torch.arange(max(layout.lengths), device=device)[None, :] < lengths[:, None]

    def call(q, k, v):
        batch = (pad_sequence(t.split(layout.lengths), batch_first=True) for t in (q, k, v))
        return attend(*(t.transpose(1, 2) for t in batch), is_causal=True).transpose(1, 2)[kept]

    return call


def ours(backend):
    def build(layout, device):
        offsets = layout.offsets.to(device)
        on_device = layout.to(torch.device(device))

        def call(q, k, v):
            try:
                return packed_attention(q, k, v, offsets, layout=on_device, backend=backend)
            except UnsupportedKernel as error:
                raise Absent(str(error)) from error

        return call

    return build


def providers_of(device):
    """name -> what makes the call of a layout."""
    own = "triton" if device == "cuda" else "cpu"
    others = ("sdpa", "varlen", "flash-attn", "flex")
    return {
        "fasttrain": ours("auto"),
        f"fasttrain {own}": ours(own),
        "SDPA masked": masked,
        "SDPA per document": each_document,
        "SDPA padded": padded,
        **{f"through fasttrain: {name}": ours(name) for name in others},
    }


# ---- the cases -----------------------------------------------------------------------------------


def steps(make, shape, backward, device):
    """The call to time: forward, or forward and the gradients of q, k and v."""
    generator = torch.Generator().manual_seed(0)

    def random(heads):
        return torch.randn(shape.tokens, heads, shape.width, generator=generator).to(
            device, shape.dtype
        )

    heads = (shape.query_heads, shape.key_heads, shape.key_heads)
    leaves = [random(count).requires_grad_(backward) for count in heads]
    do = random(shape.query_heads)
    call = make(DocumentLayout(shape.lengths), device)

    def step():
        o = call(*leaves)
        return torch.autograd.grad(o, leaves, do) if backward else o

    return step


def pytest_generate_tests(metafunc):
    shapes = CUDA_SHAPES if chosen_device(metafunc.config) == "cuda" else CPU_SHAPES
    metafunc.parametrize("shape", shapes, ids=str)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_packed_attention(compare, device, shape, backward):
    def provider(name, make):
        return Provider(name, lambda: steps(make, shape, backward, device))

    flops = shape.forward_flops
    outputs = shape.query_heads + (2 * shape.key_heads if backward else 0)
    compare(
        Case(
            "packed_attention",
            f"{shape} {'fwd+bwd' if backward else 'fwd'}",
            shape.bytes(backward),
            flops=int(flops * (1 + BACKWARD)) if backward else flops,
            output_bytes=shape.tokens * outputs * shape.width * shape.dtype.itemsize,
            predicted_seconds=shape.h200_seconds(backward),
            rounds=3,
        ),
        [provider(name, make) for name, make in providers_of(device).items()],
        ours="fasttrain",
        baseline="SDPA masked",
    )
