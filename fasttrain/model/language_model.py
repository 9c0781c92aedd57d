"""A causal language model of transformers, as the trainer sees it: body, head and loss in one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from fasttrain_kernels import linear_cross_entropy
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from fasttrain.core.batch import Batch
from fasttrain.core.interfaces import LanguageModel
from fasttrain.model import packed_attention, padded
from fasttrain.model.export import save_causal_lm
from fasttrain.model.head import Head
from fasttrain.model.length_groups import in_groups, rope_limit
from fasttrain.model.probe import evaluating
from fasttrain.model.separation import Separation

Output = Literal["loss_sum", "losses", "logits"]


class Adapters(Protocol):
    """What trains instead of the weights, and is saved instead of them."""

    def save(self, directory: Path, dtype: torch.dtype | None) -> None: ...

    def describe(self) -> str: ...


@dataclass(frozen=True)
class Source:
    """Where pretrained weights came from: a directory, absolute, or a hub name."""

    name: str
    revision: str | None


class HFLanguageModel(LanguageModel):
    """`causal_lm` is transformers' own module; its parameters keep their names below it.

    Transforms change `causal_lm` in place, so that it stays a model that transformers can save.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        separation: Separation,
        head: Head,
        source: Source | None = None,
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.separation = separation
        self.head = head
        self.source = source
        self.adapters: Adapters | None = None
        self.loss_backend: str | None = None
        """Of fasttrain_kernels.linear_cross_entropy; None: the loss is made of logits."""
        self._rope_limit = rope_limit(causal_lm.config.get_text_config())
        self.longest_document = learnt_positions(causal_lm)

    def output_weight(self) -> nn.Parameter | None:
        weight = self.head.weight
        return weight if isinstance(weight, nn.Parameter) else None

    # --- training --------------------------------------------------------------------------------

    def token_losses(self, batch: Batch, *, reduction: Literal["sum", "none"] = "sum") -> Tensor:
        losses: Tensor = self(batch, output="loss_sum" if reduction == "sum" else "losses")
        return losses

    def logits(self, batch: Batch) -> Tensor:
        logits: Tensor = self(batch, output="logits")
        return logits

    def forward(self, batch: Batch, *, output: Output) -> Tensor:
        """Body, head and loss. `output`: the sum of the token losses () or each of them (S,), over
        the supervised positions, which alone meet the head; or the logits (T, V) of every position.
        """
        hidden = self._hidden_states(batch)  # (T, H)
        if output == "logits":
            return self.head.logits(hidden)
        reduction = "sum" if output == "loss_sum" else "none"
        if self.loss_backend is not None:
            reason = self.head.why_not_fused()
            if reason is None:
                return self._fused_losses(hidden, batch, reduction, self.loss_backend)
            warnings.warn(f"the loss is made of logits from here on: {reason}", stacklevel=2)
            self.loss_backend = None
        logits = self.head.logits(hidden.index_select(0, batch.supervised_index))  # (S, V)
        labels = batch.labels.index_select(0, batch.supervised_index)
        return F.cross_entropy(logits, labels, reduction=reduction)

    def _fused_losses(self, hidden: Tensor, batch: Batch, reduction: str, backend: str) -> Tensor:
        """The same, without logits: () or (S,)."""
        weight, bias, adapter = self.head.parts(hidden)
        losses = linear_cross_entropy(
            hidden,
            weight,
            batch.labels,
            rows=batch.supervised_index,
            bias=bias,
            adapter=adapter,
            reduction=reduction,
            scale=self.head.scale,
            softcap=self.head.softcap,
            backend=backend,
        )
        assert isinstance(losses, Tensor)
        return losses if reduction == "sum" else losses.index_select(0, batch.supervised_index)

    def _hidden_states(self, batch: Batch) -> Tensor:
        way = padded if self.separation.kind == "padded" else packed_attention
        run = partial(way.hidden_states, self.causal_lm.base_model)
        return in_groups(run, batch, self._rope_limit)

    # --- use -------------------------------------------------------------------------------------

    def generate(self, prompts: list[str], *, tokenizer: Any, max_new_tokens: int) -> list[str]:
        """One prompt at a time, so that nothing is padded. Every mode of the model is put back."""
        with self._generating():
            return [self._continue(prompt, tokenizer, max_new_tokens) for prompt in prompts]

    def _continue(self, prompt: str, tokenizer: Any, max_new_tokens: int) -> str:
        ids = torch.tensor([_encode(tokenizer, prompt)], device=self.causal_lm.device)
        room = self._room_after(ids.shape[1], max_new_tokens)
        if room == 0:
            return ""
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=room,
            repetition_penalty=1.0,
            eos_token_id=_end_tokens(self.causal_lm, tokenizer),
            pad_token_id=tokenizer.eos_token_id,
        )
        mask = torch.ones_like(ids)
        out = self.causal_lm.generate(ids, attention_mask=mask, generation_config=settings)
        text: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return text

    def _room_after(self, length: int, wanted: int) -> int:
        """Tokens that can follow: a learnt position embedding has no row beyond its last."""
        limit = max_positions(self.causal_lm.config)
        return wanted if limit is None else max(0, min(wanted, limit - length))

    @contextmanager
    def _generating(self) -> Iterator[None]:
        """transformers' own attention, which knows caches; nothing random, nothing compiled."""
        standard = self.separation.standard_attention
        with (
            evaluating(self),
            torch.compiler.set_stance("force_eager"),
            packed_attention.attention_implementation(self.causal_lm, standard),
        ):
            yield

    def save_pretrained(self, directory: Path, *, dtype: torch.dtype | None) -> None:
        if self.adapters is not None:
            self.adapters.save(directory, dtype)
        else:
            save_causal_lm(self.causal_lm, directory, dtype)

    def describe(self) -> str:
        config = self.causal_lm.config.get_text_config()
        weight = self.head.weight
        tied = weight is self.causal_lm.get_input_embeddings().weight
        parts = [
            self.source.name if self.source else "random weights",
            type(self.causal_lm).__name__,
            f"{config.num_hidden_layers} layers of width {config.hidden_size}",
            f"vocabulary {weight.shape[0]}{' (tied)' if tied else ''}",
            f"attention {self.separation.kind} ({self.separation.reason})",
        ]
        if self.adapters is not None:
            parts.append(self.adapters.describe())
        return " · ".join(parts)


def _end_tokens(causal_lm: PreTrainedModel, tokenizer: Any) -> list[int]:
    """What ends a text: the model's own end tokens and the tokenizer's."""
    named = causal_lm.generation_config.eos_token_id
    ends = set(named if isinstance(named, list) else [named])
    return sorted({*ends, tokenizer.eos_token_id} - {None})


def learnt_positions(causal_lm: PreTrainedModel) -> int | None:
    """How many positions a table of learnt ones has; None where positions are computed.

    Such a table is an embedding beside the tokens' own with a row for each position (and, in OPT,
    two more in front).
    """
    limit = max_positions(causal_lm.config)
    tokens = causal_lm.get_input_embeddings()
    tables = (m for m in causal_lm.base_model.modules() if isinstance(m, nn.Embedding))
    rows = [table.num_embeddings for table in tables if table is not tokens]
    return limit if limit is not None and any(limit <= n <= limit + 2 for n in rows) else None


def max_positions(config: Any) -> int | None:
    """The longest sequence that a transformers config says its model is made for."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def _encode(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt. A chat template has written what is special; a plain text begins as
    the tokenizer begins texts, and is not ended. An empty one begins where texts do."""
    plain = not tokenizer.chat_template
    ids: list[int] = tokenizer(prompt, add_special_tokens=plain)["input_ids"]
    if plain and ids[-1:] == [tokenizer.eos_token_id]:
        ids = ids[:-1]
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return ids or [begin]
