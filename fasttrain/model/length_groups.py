"""Models whose positions mean something else once a sequence is long.

With RoPE of the kinds `longrope` and `dynamic`, the frequencies of every document follow from the
longest one in the batch as soon as that exceeds a limit: a long document would change its short
neighbours. Documents over the limit therefore go through the model one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from fasttrain_kernels.layout import DocumentLayout
from torch import Tensor

from fasttrain.core.batch import Batch


def rope_limit(config: Any) -> int | None:
    """The length from which on a document would change its neighbours; None: it never does."""
    named = getattr(config, "rope_parameters", None) or {}
    kinds = [named, *(value for value in named.values() if isinstance(value, dict))]
    limits = []
    for rope in kinds:
        if rope.get("rope_type") == "longrope":
            limits.append(rope["original_max_position_embeddings"])
        elif "dynamic" in str(rope.get("rope_type")):
            limits.append(config.max_position_embeddings)
    return min(limits, default=None)


def in_groups(run: Callable[[Batch], Tensor], batch: Batch, limit: int | None) -> Tensor:
    """(T, H): `run(batch)`, the documents longer than `limit` each in a run of their own."""
    lengths = batch.layout.lengths
    if limit is None or len(lengths) == 1 or max(lengths) <= limit:
        return run(batch)
    short = [i for i, length in enumerate(lengths) if length <= limit]
    long = [i for i, length in enumerate(lengths) if length > limit]
    groups = [[i] for i in long] + ([short] if short else [])
    documents: dict[int, Tensor] = {}
    for group in groups:
        hidden = run(_take(batch, group))
        documents |= zip(group, hidden.split([lengths[i] for i in group]), strict=True)
    return torch.cat([documents[i] for i in range(len(lengths))])


def _take(batch: Batch, chosen: list[int]) -> Batch:
    """The inputs of the chosen documents; what only the loss needs stays as it was."""
    lengths = list(batch.layout.lengths)
    layout = DocumentLayout(tuple(lengths[i] for i in chosen))

    def pick(tokens: Tensor) -> Tensor:
        pieces = tokens.split(lengths)
        return torch.cat([pieces[i] for i in chosen])

    return replace(
        batch,
        input_ids=pick(batch.input_ids),
        position_ids=pick(batch.position_ids),
        cu_seqlens=layout.offsets.to(batch.cu_seqlens.device),
        layout=layout.to(batch.cu_seqlens.device),
    )
