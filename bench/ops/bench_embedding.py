"""embedding, forward and backward, against F.embedding and torch.compile of it."""

import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels import embedding

from bench.harness import Case, Provider

F32, BF16 = torch.float32, torch.bfloat16
# (tokens, width, vocabulary): a small model; a 1B model with Llama 3's tokenizer.
CASES = [(4096, 512, 32000), (8192, 1024, 128256)]


def text_like(tokens, vocabulary):
    """Ids of which the r-th most frequent occurs about 1 / r as often as the first (Zipf's law),
    scattered over the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(tokens, generator=generator, dtype=torch.float64)
    rank = (float(vocabulary) ** uniform - 1).long().clamp(max=vocabulary - 1)
    return torch.randperm(vocabulary, generator=generator)[rank]


def bytes_moved(ids, width, vocabulary, dtype):
    """Rows in, y out; dy in, dweight out, each of its rows once: V * H of them are most."""
    row = width * dtype.itemsize
    used = ids.unique().numel()
    return (used + 2 * ids.numel() + vocabulary) * row + 2 * ids.numel() * ids.dtype.itemsize


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("tokens", "width", "vocabulary"), CASES)
def test_embedding(compare, device, tokens, width, vocabulary, dtype):
    ids = text_like(tokens, vocabulary)
    moved = bytes_moved(ids, width, vocabulary, dtype)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(vocabulary, width, generator=generator).to(device, dtype).requires_grad_()
    dy = torch.randn(tokens, width, generator=generator).to(device, dtype)
    ids = ids.to(device)

    def provider(name, make):
        def build():
            call = make()
            return lambda: torch.autograd.grad(call(ids, weight), weight, dy)

        return Provider(name, build)

    def compiled():
        torch._dynamo.reset()
        return torch.compile(F.embedding)

    name = f"{tokens}x{width} of {vocabulary} {str(dtype).removeprefix('torch.')} fwd+bwd"
    compare(
        Case("embedding", name, moved),
        [
            provider("fasttrain", lambda: embedding),
            provider("eager", lambda: F.embedding),
            provider("torch.compile", compiled),
        ],
        ours="fasttrain",
        baseline="eager",
    )
