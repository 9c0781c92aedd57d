"""Packs → the step batches of one rank, from any position on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fasttrain.core.batch import Batch, StepBatch
from fasttrain.core.interfaces import Topology, TrainingData
from fasttrain.data.collate import collate
from fasttrain.data.documents import Documents
from fasttrain.data.pack import Packer, Packs, balanced_shares

T = TypeVar("T")

# The epoch that is trained on, and the next one, from which batches are made ahead.
_KEPT_EPOCHS = 2


@dataclass(frozen=True)
class BatchShape:
    """How many packs a step has, and which are this rank's."""

    micro_batch_size: int
    accumulation: int
    topology: Topology

    @property
    def packs_per_step(self) -> int:
        return self.micro_batch_size * self.accumulation * self.topology.data_parallel_size


class PackedTraining(TrainingData):
    """A step takes the epoch's next packs; the last step of an epoch may have fewer."""

    def __init__(
        self, documents: Documents, packer: Packer, shape: BatchShape, *, vocab_size: int
    ) -> None:
        self.documents = documents
        self._packer = packer
        self._shape = shape
        self._vocab_size = vocab_size
        self._packs: dict[int, Packs] = {}
        self._steps: dict[int, int] = {}
        self._lock = threading.Lock()  # the batches of the next step are made in another thread

    def packs(self, epoch: int) -> Packs:
        """All ranks' packs of an epoch, in their order."""
        with self._lock:
            if epoch not in self._packs:
                while len(self._packs) >= _KEPT_EPOCHS:
                    del self._packs[next(iter(self._packs))]
                self._packs[epoch] = self._packer.packs(epoch)
            return self._packs[epoch]

    def steps_in_epoch(self, epoch: int) -> int:
        epoch = epoch if self._packer.count_varies else 0
        if epoch not in self._steps:
            self._steps[epoch] = -(-len(self.packs(epoch)) // self._shape.packs_per_step)
        return self._steps[epoch]

    def stream(self, epoch: int, step_in_epoch: int) -> Generator[StepBatch, None, None]:
        positions = self._positions(epoch, step_in_epoch)
        return made_ahead(lambda: self._step(*next(positions)))

    def token_counts(self, vocab_size: int) -> Tensor:
        return torch.from_numpy(self.documents.target_counts(vocab_size))

    def _positions(self, epoch: int, step: int) -> Iterator[tuple[int, int]]:
        while True:
            for number in range(step, self.steps_in_epoch(epoch)):
                yield epoch, number
            epoch, step = epoch + 1, 0

    def _step(self, epoch: int, step: int) -> StepBatch:
        packs, shape = self.packs(epoch), self._shape
        first = step * shape.packs_per_step
        last = min(first + shape.packs_per_step, len(packs))
        costs = packs.attention_costs(self.documents.lengths, first, last)
        shares = balanced_shares(costs, shape.topology.data_parallel_size)
        mine = [first + pack for pack in shares[shape.topology.data_parallel_rank]]
        return StepBatch(
            epoch=epoch,
            step_in_epoch=step,
            steps_in_epoch=self.steps_in_epoch(epoch),
            micro_batches=tuple(
                self._micro_batch(packs, mine[start : start + shape.micro_batch_size])
                for start in range(0, len(mine), shape.micro_batch_size)
            ),
        )

    def _micro_batch(self, packs: Packs, numbers: list[int]) -> Batch:
        return collate(self.documents, packs.gather(numbers), vocab_size=self._vocab_size)


def made_ahead(make: Callable[[], T]) -> Generator[T, None, None]:
    """What `make()` returns, again and again; the next one is made in a thread meanwhile.

    An error in `make` is raised where its result would have come. Closing the iterator ends the
    thread.
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix="fasttrain-batches")
    try:
        coming = executor.submit(make)
        while True:
            ready = coming.result()
            coming = executor.submit(make)
            yield ready
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
