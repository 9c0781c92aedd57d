"""Documents → one flat batch."""

from __future__ import annotations

import numpy as np
import torch
from fasttrain_kernels.layout import DocumentLayout
from torch import Tensor

from fasttrain.core.batch import IGNORED_LABEL, Batch
from fasttrain.data.documents import Documents


def collate(documents: Documents, chosen: np.ndarray, *, vocab_size: int) -> Batch:
    """The `chosen` documents (numbers, at least one) after one another.

    `vocab_size` bounds the ids: ValueError that names the source of a document with another one.
    In a process that uses a GPU the tensors lie in page-locked memory, from where copies to it are
    asynchronous.
    """
    parts = [documents[index] for index in chosen.tolist()]
    sources = tuple(documents.source(index) for index in chosen.tolist())
    lengths = np.array([len(tokens) for tokens, _ in parts])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.concatenate([tokens for tokens, _ in parts]).astype(np.int64)
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        _raise_bad_id(parts, sources, vocab_size)
    labels = _labels(tokens, np.concatenate([supervised for _, supervised in parts]))
    index = np.flatnonzero(labels != IGNORED_LABEL)
    positions = np.arange(len(tokens)) - np.repeat(starts[:-1], lengths)

    pinned = torch.cuda.is_initialized()
    layout = DocumentLayout(tuple(lengths.tolist()))

    def tensor(array: np.ndarray) -> Tensor:
        made = torch.from_numpy(array)
        return made.pin_memory() if pinned else made

    return Batch(
        input_ids=tensor(tokens),
        labels=tensor(labels),
        position_ids=tensor(positions),
        cu_seqlens=tensor(starts.astype(np.int32)),
        supervised_index=tensor(index),
        layout=layout.pin_memory() if pinned else layout,
        num_supervised=len(index),
        sources=sources,
    )


def _labels(tokens: np.ndarray, supervised: np.ndarray) -> np.ndarray:
    """(T,) int64: the next token where it is supervised. A document's first token never is, so that
    the label of a document's last token is ignored."""
    labels = np.full(len(tokens), IGNORED_LABEL)
    labels[:-1] = np.where(supervised[1:], tokens[1:], IGNORED_LABEL)
    return labels


def _raise_bad_id(
    parts: list[tuple[np.ndarray, np.ndarray]], sources: tuple[str, ...], vocab_size: int
) -> None:
    for (tokens, _), source in zip(parts, sources, strict=True):
        bad = tokens[(tokens < 0) | (tokens >= vocab_size)]
        if len(bad):
            raise ValueError(
                f"a document of {source} has the token id {bad[0]}; ids end at {vocab_size - 1}."
            )
