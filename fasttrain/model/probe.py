"""A few tokens through the actual model, to learn how it behaves before anything rests on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from fasttrain_kernels.layout import DocumentLayout
from torch import nn
from transformers import PreTrainedModel

from fasttrain.core.batch import Batch

LENGTHS = (7, 5, 3)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradient inside; each module's mode as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def exact_products() -> Iterator[None]:
    """fp32 matrix products in fp32 inside, where they may run in TF32 outside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def probe_batch(causal_lm: PreTrainedModel, *, change_neighbours: bool = False) -> Batch:
    """Three short documents of random tokens, always the same, or with the first and the last
    changed. The run's random state is not touched."""
    vocab_size = causal_lm.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (sum(LENGTHS),), generator=generator)
    if change_neighbours:
        middle = slice(LENGTHS[0], LENGTHS[0] + LENGTHS[1])
        changed = (ids + 1 + vocab_size // 2) % vocab_size
        changed[middle] = ids[middle]
        ids = changed
    total, device = len(ids), causal_lm.device
    return Batch(
        input_ids=ids.to(device),
        labels=ids.to(device),
        position_ids=torch.cat([torch.arange(length) for length in LENGTHS]).to(device),
        cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0).to(device, torch.int32),
        supervised_index=torch.arange(total, device=device),
        layout=DocumentLayout(LENGTHS).to(device),
        num_supervised=total,
        sources=("probe",) * len(LENGTHS),
    )
