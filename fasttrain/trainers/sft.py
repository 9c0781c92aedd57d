"""Supervised fine-tuning: learn the assistant's answers."""

from __future__ import annotations

from fasttrain.config.schema.trainer import SFTConfig
from fasttrain.core.batch import Batch, LossSum
from fasttrain.core.interfaces import Examples, LanguageModel
from fasttrain.core.trainer import Trainer


class SFTTrainer(Trainer):
    """Cross-entropy of the supervised tokens: answers and their end tokens; all of a plain text."""

    Config = SFTConfig
    examples = Examples(supervise="answers")

    def loss(self, model: LanguageModel, batch: Batch) -> LossSum:
        return LossSum(model.token_losses(batch), batch.num_supervised)
