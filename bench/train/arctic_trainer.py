"""ArcticTraining's SFT trainer with our optimizer and a stopwatch.

A module of its own: `datasets` pickles the trainer, and a script's own classes don't survive that.
"""

# No postponed annotations here: ArcticTraining reads its subclasses' types.
from typing import Any

import torch
from arctic_training import FusedAdamOptimizerFactory, SFTTrainer
from measure import BatchCount, Stopwatch, count_batch


class TorchAdamWFactory(FusedAdamOptimizerFactory):
    """torch's fused AdamW, as everyone else has. Its own is compiled on the spot, for GPUs only."""

    name = "torch_adamw"

    def create_optimizer(self, model: Any, optimizer_config: Any) -> torch.optim.Optimizer:
        groups = self.get_optimizer_grouped_params(model, optimizer_config.weight_decay)
        return torch.optim.AdamW(
            groups, lr=optimizer_config.learning_rate, betas=optimizer_config.betas, fused=True
        )


class MeasuredSFTTrainer(SFTTrainer):
    """SFTTrainer that notes the time, the tokens and the loss of every step."""

    name = "measured_sft"
    optimizer_factory: TorchAdamWFactory
    watch: Stopwatch
    counts: list[BatchCount]
    losses: list[torch.Tensor]

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        self.losses.append(super().loss(batch))
        return self.losses[-1]

    def step(self, batch: dict[str, Any]) -> None:
        # The lengths of a pack's documents; what is beyond them is padding.
        lengths = torch.tensor([sum(row) for row in batch["packed_sample_seqlens"]])
        columns = torch.arange(batch["input_ids"].shape[1])
        self.counts.append(count_batch(batch["labels"], columns < lengths[:, None]))
        super().step(batch)
        self.watch.step_ended(self.config.exit_iteration)
