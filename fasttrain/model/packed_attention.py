"""Attention that keeps the documents of a flat batch apart, without a mask for the whole batch: T
tokens in documents of length n cost Σ n², not T².

transformers' models take their attention from a table by name. Ours, `fasttrain_per_document`, runs
the kernel that the layer has been given (transforms/sites/packed_attention.py); without one it
makes a call of PyTorch's attention for each document. Where documents begin travels as the keyword
`packed_documents` of the model call, down to every layer, so that a layer which activation
checkpointing runs again sees it again.

Shapes: T tokens in all, n of one document, Hq query and Hkv key heads, D and Dv their widths.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from fasttrain_kernels import DocumentLayout, packed_attention
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from fasttrain.core.batch import Batch

IMPLEMENTATION = "fasttrain_per_document"
BACKEND = "packed_attention_backend"  # the attribute of a layer that names its kernel

# Keywords that layers hand down to every attention function, and that change nothing in it: they
# were used before it (positions, caches) or ask for outputs that are never asked for here.
HARMLESS = frozenset(
    {
        "cache_position",
        "layer_idx",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "use_cache",
    }
)


class UnsupportedAttention(ValueError):  # noqa: N818  (what it says is the reason, not an error)
    """A model asks its attention for something that is not computed document by document."""


class PackedDocuments:
    """Where documents begin, on its way through a model.

    A plain object, not a tuple: torch.compile would compile a layer anew for each tuple of lengths.
    `windows`, where given, collects the sliding window of each attention call.
    """

    def __init__(
        self,
        cu_seqlens: Tensor,
        layout: DocumentLayout,
        windows: list[int | None] | None = None,
    ) -> None:
        self.cu_seqlens = cu_seqlens
        self.layout = layout
        self.windows = windows


def hidden_states(
    body: nn.Module, batch: Batch, *, windows: list[int | None] | None = None
) -> Tensor:
    """(T, H): the body's output at every token of the flat batch."""
    assert isinstance(batch.layout, DocumentLayout)
    output = body(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        packed_documents=PackedDocuments(batch.cu_seqlens, batch.layout, windows),
    )
    hidden: Tensor = output[0][0]
    return hidden


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Inside, the model takes its attention from transformers' table under `name`."""
    outside = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(outside)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query (1, Hq, T, D), key (1, Hkv, T, D), value (1, Hkv, T, Dv) -> (1, T, Hq, Dv), no weights.

    The signature of transformers' attention functions. UnsupportedAttention where `module` asks for
    anything but causal attention with scale, dropout, sliding window, softcap and sinks.
    """
    documents: PackedDocuments | None = options.pop("packed_documents", None)
    window: int | None = options.pop("sliding_window", None)
    softcap: float | None = options.pop("softcap", None)
    sinks: Tensor | None = options.pop("s_aux", None)
    reason = _refusal(module, documents, query.shape[0], attention_mask, options)
    if reason is not None:
        raise UnsupportedAttention(f"{type(module).__name__} {reason}")
    assert documents is not None
    if documents.windows is not None:
        documents.windows.append(window)
    backend: str | None = getattr(module, BACKEND, None)
    if backend is None and sinks is not None:
        backend = "eager"  # PyTorch's attention knows no sinks
    if backend is None:
        output = _attend_each(
            query, key, value, dropout, scaling, documents, window=window, softcap=softcap
        )
        return output, None
    if dropout > 0:
        raise UnsupportedAttention(
            f"{type(module).__name__} drops attention weights (dropout {dropout}), which no kernel "
            "does; set kernels.packed_attention=eager"
        )
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output = packed_attention(
        q,
        k,
        v,
        documents.cu_seqlens,
        layout=documents.layout,
        window=window,
        softcap=softcap,
        sinks=sinks,
        scale=scaling,
        backend=backend,
    )
    return output[None], None


@torch.compiler.disable
def _attend_each(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    documents: PackedDocuments,
    *,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """A call of PyTorch's attention for each document; shapes as in `attend`."""
    lengths = list(documents.layout.lengths)
    assert sum(lengths) == query.shape[2]
    pieces = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [
        _attend_one(q, k, v, dropout, scaling, window=window, softcap=softcap).transpose(1, 2)
        for q, k, v in pieces
    ]
    return torch.cat(outputs, dim=1)


AttentionInterface.register(IMPLEMENTATION, attend)


def _refusal(
    module: nn.Module,
    documents: PackedDocuments | None,
    rows: int,
    mask: Tensor | None,
    options: dict[str, Any],
) -> str | None:
    """Why this call can't be served, or None."""
    if documents is None:
        return "is not told where documents begin: its model drops keywords it does not know"
    if rows != 1:
        return f"is given {rows} rows, where packed documents are one"
    if mask is not None:
        return "attends under a mask of its own"
    causal = options.pop("is_causal", None)
    if not (causal if causal is not None else getattr(module, "is_causal", True)):
        return "is not causal"
    unknown = sorted(name for name in options if name not in HARMLESS and options[name] is not None)
    if unknown:
        return f"asks for {', '.join(unknown)}"
    return None


def _attend_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scale: float | None,
    *,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One document of n tokens, shapes as in `attend` -> (1, Hq, n, Dv)."""
    length = query.shape[2]
    visible = None  # plain causal, which SDPA knows without a mask
    if softcap is not None or (window is not None and window < length):
        visible = _visible(length, window or length, query.device)
    if softcap is not None:
        return _attend_capped(query, key, value, dropout, scale, visible, softcap)
    grouped = visible is None and _shares_heads_natively(query, value)
    if not grouped:
        key, value = _repeat_heads(key, query), _repeat_heads(value, query)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=visible,
        dropout_p=dropout,
        is_causal=visible is None,
        scale=scale,
        enable_gqa=grouped and query.shape[1] != key.shape[1],
    )


def _attend_capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scale: float | None,
    visible: Tensor | None,
    softcap: float,
) -> Tensor:
    """Scores squashed to ±softcap before the softmax (Gemma 2, arXiv 2408.00118, section 2)."""
    key, value = _repeat_heads(key, query), _repeat_heads(value, query)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores.to(_at_least_fp32(scores)) / softcap)
    assert visible is not None
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).to(value.dtype)
    return F.dropout(weights, dropout) @ value


def _visible(length: int, window: int, device: torch.device) -> Tensor:
    """(n, n) bool: query i sees key j. A window counts the keys a query sees, itself included."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def _shares_heads_natively(query: Tensor, value: Tensor) -> bool:
    """Whether SDPA serves grouped key heads without a copy. Otherwise (fp32 on CUDA, or heads over
    256) it would fall back to a path that holds all n² scores."""
    if query.shape[-1] != value.shape[-1] or query.shape[-1] > 256:
        return False
    mixed = torch.is_autocast_enabled(query.device.type)
    return query.device.type != "cuda" or mixed or query.dtype != torch.float32


def _repeat_heads(tensor: Tensor, query: Tensor) -> Tensor:
    """(1, Hkv, n, D) -> (1, Hq, n, D), each key head for its group of query heads."""
    groups = query.shape[1] // tensor.shape[1]
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)


def _at_least_fp32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
