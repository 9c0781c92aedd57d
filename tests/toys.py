"""A language model small enough to reason about, and batches for it."""

from pathlib import Path

import torch
from fasttrain_kernels.layout import DocumentLayout
from torch import nn

from fasttrain.core.batch import IGNORED_LABEL, Batch, LossSum, StepBatch
from fasttrain.core.interfaces import LanguageModel


class ToyModel(LanguageModel):
    """Embedding and head: the next token depends on the present one alone."""

    def __init__(self, vocab_size: int = 11, width: int = 4, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(vocab_size, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, batch):
        return self.head(self.norm(self.embedding(batch.input_ids)))

    def token_losses(self, batch, *, reduction="sum"):
        logits = self(batch)[batch.supervised_index].float()
        labels = batch.labels[batch.supervised_index]
        return nn.functional.cross_entropy(logits, labels, reduction=reduction)

    def logits(self, batch):
        return self(batch)

    def generate(self, prompts, *, tokenizer, max_new_tokens):
        return ["" for _ in prompts]

    def save_pretrained(self, directory: Path, *, dtype):
        torch.save(self.state_dict(), directory / "toy.pt")

    def describe(self):
        return "toy"


def document(ids: list[int], supervised: list[bool] | None = None) -> tuple[list[int], list[int]]:
    """A document's ids and its shifted labels."""
    supervised = supervised or [True] * len(ids)
    labels = [i if s else IGNORED_LABEL for i, s in zip(ids[1:], supervised[1:], strict=True)]
    return ids, [*labels, IGNORED_LABEL]


def batch_of(*documents: tuple[list[int], list[int]]) -> Batch:
    """The flat batch of documents made by `document`."""
    ids = [i for document_ids, _ in documents for i in document_ids]
    labels = torch.tensor([i for _, document_labels in documents for i in document_labels])
    lengths = tuple(len(document_ids) for document_ids, _ in documents)
    supervised = (labels != IGNORED_LABEL).nonzero().flatten()
    return Batch(
        input_ids=torch.tensor(ids, dtype=torch.int64),
        labels=labels.to(torch.int64),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32),
        supervised_index=supervised,
        layout=DocumentLayout(lengths),
        num_supervised=len(supervised),
        sources=("toy",) * len(documents),
    )


def step_batch(*micro_batches: Batch, epoch: int = 0, step: int = 0, steps: int = 4) -> StepBatch:
    return StepBatch(epoch, step, steps, micro_batches)


def sum_of_losses(model: LanguageModel):
    """The plain loss function over a model."""
    return lambda batch: LossSum(model.token_losses(batch), batch.num_supervised)
