"""The attention function itself, against softmax(QKᵀ)V written out in fp64."""

import pytest
import torch
from fasttrain_kernels import DocumentLayout
from torch import nn

from fasttrain.model.packed_attention import (
    BACKEND,
    PackedDocuments,
    UnsupportedAttention,
    attend,
)

LENGTHS = (7, 1, 12)


class Attention(nn.Module):
    is_causal = True


def inputs(heads, key_heads, width, value_width=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, width), (key_heads, width), (key_heads, value_width or width)]
    return [
        torch.randn(1, h, sum(LENGTHS), d, generator=generator, dtype=dtype).requires_grad_()
        for h, d in shapes
    ]


def run(query, key, value, *, mask=None, module=None, kernel=None, **options):
    layout = DocumentLayout(LENGTHS)
    options = {"packed_documents": PackedDocuments(layout.offsets, layout)} | options
    module = module or Attention()
    if kernel is not None:
        setattr(module, BACKEND, kernel)
    output, weights = attend(module, query, key, value, mask, **options)
    assert weights is None
    return output


def written_out(query, key, value, *, scaling=None, sliding_window=None, softcap=None, s_aux=None):
    """One mask over the whole batch."""
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    position = torch.arange(sum(LENGTHS))
    distance = position[:, None] - position[None, :]
    visible = (distance >= 0) & (document[:, None] == document[None, :])
    if sliding_window is not None:
        visible &= distance < sliding_window
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if s_aux is not None:
        sinks = s_aux[None, :, None, None].expand(1, -1, sum(LENGTHS), 1)
        scores = torch.cat([scores, sinks.to(scores)], -1)
    weights = scores.softmax(-1)[..., : sum(LENGTHS)]
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize("kernel", [None, "eager"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_forward_and_gradients(heads, window, softcap, kernel):
    tensors = inputs(*heads, width=8)
    options = {"sliding_window": window, "softcap": softcap, "scaling": 0.3}
    output = run(*tensors, kernel=kernel, **options)
    expected = written_out(*tensors, **options)
    assert output.shape == (1, sum(LENGTHS), heads[0], 8)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    direction = torch.randn_like(output)
    ours = torch.autograd.grad(output, tensors, direction)
    theirs = torch.autograd.grad(expected, tensors, direction)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_values_may_be_narrower_than_keys():
    tensors = inputs(4, 4, width=12, value_width=8)
    torch.testing.assert_close(run(*tensors), written_out(*tensors), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kernel", [None, "eager"])
def test_sinks(kernel):
    """gpt-oss hands them down as s_aux."""
    tensors = inputs(4, 2, width=8)
    options = {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)}
    output = run(*tensors, kernel=kernel, **options)
    torch.testing.assert_close(output, written_out(*tensors, **options), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_bf16_is_rounded_only(softcap):
    exact = inputs(4, 2, width=8)
    rounded = [tensor.detach().bfloat16() for tensor in exact]
    output = run(*rounded, softcap=softcap, sliding_window=3)
    expected = written_out(*(t.double() for t in rounded), softcap=softcap, sliding_window=3)
    assert output.dtype == torch.bfloat16
    # Scores, weights and output are each rounded to 8 bits.
    torch.testing.assert_close(output.double(), expected, rtol=3e-2, atol=3e-2)


class Bidirectional(Attention):
    is_causal = False


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"packed_documents": None}, "its model drops keywords it does not know"),
        ({"mask": torch.zeros(1, 1, 20, 20)}, "attends under a mask of its own"),
        ({"is_causal": False}, "is not causal"),
        ({"module": Bidirectional()}, "Bidirectional is not causal"),
        ({"kernel": "eager", "dropout": 0.5}, r"drops attention weights \(dropout 0.5\)"),
        ({"position_bias": torch.zeros(1), "indices": 1}, "asks for indices, position_bias"),
    ],
)
def test_what_it_cannot_compute_it_refuses(change, reason):
    with pytest.raises(UnsupportedAttention, match=reason):
        run(*inputs(4, 2, width=8), **change)


def test_what_changes_nothing_is_taken():
    tensors = inputs(4, 2, width=8)
    output = run(*tensors, position_ids=torch.arange(20)[None], use_cache=False, s_aux=None)
    assert torch.equal(output, run(*tensors))
