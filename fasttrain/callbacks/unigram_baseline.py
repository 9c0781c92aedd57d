"""Is the held-out loss any good? A unigram model of the training tokens gives it a scale."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasttrain.callbacks.held_out import require_held_out
from fasttrain.config.schema.callback import UnigramBaselineConfig
from fasttrain.core.batch import IGNORED_LABEL
from fasttrain.core.data_report import DataReport
from fasttrain.core.events import Callback, EvaluationRecord
from fasttrain.core.interfaces import EvaluationData
from fasttrain.runtime.log import output

if TYPE_CHECKING:
    from fasttrain.core.run import Run


class UnigramBaseline(Callback):
    """Tells how far below a unigram model's the held-out loss is.

    The unigram model knows how often each token is a target in the training data (plus one, so that
    none is impossible) and nothing of what stands before it.
    """

    Config = UnigramBaselineConfig

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.loss: float | None = None

    def on_data_ready(self, run: Run, record: DataReport) -> None:
        require_held_out(record, "unigram_baseline")

    def on_train_start(self, run: Run, record: None) -> None:
        assert run.data.evaluation is not None, "refused in on_data_ready"
        # Ids may have holes, so that there are more of them than len() counts.
        vocab_size = 1 + max(run.tokenizer.get_vocab().values())
        counts = run.data.train.token_counts(vocab_size)
        self.loss = unigram_loss(counts, run.data.evaluation, run.config.eval.max_batches)
        output().print(f"a unigram model's held-out loss is {self.loss:.3f}")

    def on_evaluation_end(self, run: Run, record: EvaluationRecord) -> None:
        if self.loss is None:
            return
        difference = self.loss - record.loss
        side = "below" if difference >= 0 else "above"
        run.summary["unigram"] = (
            f"the held-out loss is {abs(difference):.3f} nat {side} a unigram model's "
            f"({self.loss:.3f})"
        )


def unigram_loss(
    counts: Tensor, evaluation: EvaluationData, max_batches: int | None = None
) -> float:
    """Nats per supervised token of the held-out data under p(t) = (counts[t] + 1) / (Σ counts + V).

    `counts` (V,) int64. The batches are those that an evaluation of the model sees.
    """
    nats = -torch.log((counts + 1).double() / (counts.sum() + counts.numel()).double())
    total, tokens = 0.0, 0
    for batch in itertools.islice(evaluation.batches(), max_batches):
        labels = batch.labels[batch.labels != IGNORED_LABEL]
        total += nats[labels].sum().item()
        tokens += labels.numel()
    return total / max(tokens, 1)
