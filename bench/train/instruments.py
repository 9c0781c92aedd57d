"""What is put into a trainer of the transformers family to measure it: nothing that it computes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from measure import BatchCount, Job, Stopwatch, count_batch
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class CountingCollator:
    """Does as the collator it wraps, and remembers what each batch held."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Any]) -> None:
        self.collator = collator
        self.counts: list[BatchCount] = []

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        batch = self.collator(features)
        # Without padding there is no mask.
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        self.counts.append(count_batch(batch["labels"], mask))
        return batch


class StopwatchCallback(TrainerCallback):
    """Tells the stopwatch of every optimizer step."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.watch.step_ended(state.max_steps)


class EpochInMiniature(Sampler[int]):
    """A few batches of another sampler's epoch, which stand for all of it.

    Its batches are ordered by their longest row, every k-th is taken from a seeded start, and these
    come in a seeded random order after as many others for the warm-up.
    """

    def __init__(self, sampler: Sampler[int], lengths: list[int], rows: int, job: Job) -> None:
        self.sampler, self.lengths, self.rows, self.job = sampler, lengths, rows, job

    def __len__(self) -> int:
        return self.job.workload.total_steps * self.rows

    def __iter__(self) -> Iterator[int]:
        workload, rng = self.job.workload, random.Random(self.job.seed)
        order, rows = list(self.sampler), self.rows
        batches = [order[i : i + rows] for i in range(0, len(order) - rows + 1, rows)]
        batches.sort(key=lambda batch: max(self.lengths[index] for index in batch))
        stride, offset = len(batches) / workload.steps, rng.random()
        measured = {int(stride * (k + offset)) for k in range(workload.steps)}
        others = [number for number in range(len(batches)) if number not in measured]
        chosen = rng.sample(others, workload.warmup) + rng.sample(sorted(measured), len(measured))
        return (index for number in chosen for index in batches[number])


class Miniature:
    """Mixed into a Trainer class: its sampler's epoch in miniature. Set `job` before training."""

    job: Job

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> EpochInMiniature:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(ids) for ids in dataset["input_ids"]]
        sampler = super()._get_train_sampler(dataset)
        return EpochInMiniature(sampler, lengths, self.args.train_batch_size, self.job)
