"""Causal language modelling: learn every token."""

from __future__ import annotations

from fasttrain.config.schema.trainer import CausalConfig
from fasttrain.core.batch import Batch, LossSum
from fasttrain.core.interfaces import Examples, LanguageModel
from fasttrain.core.trainer import Trainer


class CausalTrainer(Trainer):
    """Cross-entropy of every token. Chats are learnt as their rendered text, prompts included."""

    Config = CausalConfig
    examples = Examples(supervise="all")

    def loss(self, model: LanguageModel, batch: Batch) -> LossSum:
        return LossSum(model.token_losses(batch), batch.num_supervised)
