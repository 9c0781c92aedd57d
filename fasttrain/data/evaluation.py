"""The held-out documents: packed as the training documents are, in an order that never changes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from fasttrain.core.batch import Batch
from fasttrain.core.interfaces import EvaluationData
from fasttrain.data.batches import BatchShape
from fasttrain.data.collate import collate
from fasttrain.data.conversation import Conversation
from fasttrain.data.documents import Documents
from fasttrain.data.pack import Packer
from fasttrain.data.template import ChatTemplate, TemplateRefusalError, template_message

# Characters of plain text that are given as a prompt, and shown as what follows it.
_PROMPT_CHARACTERS, _ANSWER_CHARACTERS = 200, 400


@dataclass(frozen=True)
class PackedEvaluation(EvaluationData):
    """Every rank takes each n-th pack, so that ranks differ by one pack at most."""

    rows: Dataset
    documents: Documents
    packer: Packer
    shape: BatchShape
    template: ChatTemplate | None
    vocab_size: int

    def batches(self) -> Iterator[Batch]:
        packs, topology = self.packer.packs(0), self.shape.topology
        mine = list(range(topology.data_parallel_rank, len(packs), topology.data_parallel_size))
        size = self.shape.micro_batch_size
        for start in range(0, len(mine), size):
            chosen = packs.gather(mine[start : start + size])
            yield collate(self.documents, chosen, vocab_size=self.vocab_size)

    def prompts(self, count: int) -> list[tuple[str, str]]:
        rows = self.documents.rows.tolist()
        # Evenly over the rows: neighbours come from one source, or one module, and look alike.
        spread = [rows[i * len(rows) // count] for i in range(count)]
        candidates = dict.fromkeys([*spread, *rows])
        pairs = (self._pair(self.rows[row]) for row in candidates)
        return list(itertools.islice((pair for pair in pairs if pair is not None), count))

    def _pair(self, row: dict[str, Any]) -> tuple[str, str] | None:
        """A conversation up to its last answer, or a text cut at a blank; None without either."""
        if row["kind"] == "text":
            text = row["text"]
            half = min(len(text) // 2, _PROMPT_CHARACTERS)
            cut = max(text.find(" ", half), half)
            return text[:cut], text[cut : cut + _ANSWER_CHARACTERS]
        assert self.template is not None, "conversations need a chat template"
        messages = Conversation.from_json(row["messages"]).messages
        last = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=0)
        try:
            before = [template_message(message) for message in messages[:last]]
            return self.template.render(before, prompt=True), messages[last].content or ""
        except TemplateRefusalError:  # an answer that nothing was asked for has no prompt
            return None
