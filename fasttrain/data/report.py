"""What is told about the data before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from fasttrain.core.data_report import DataReport, DecodedSample, SourceReport
from fasttrain.data.cache import Tokenized
from fasttrain.data.pack import Packs
from fasttrain.data.tally import Tally

DEFAULT_LENGTH = 8192


@dataclass(frozen=True)
class MaxLength:
    """Tokens of a pack and of the longest document, and why so many."""

    tokens: int
    reason: str


def choose_max_length(given: int | None, model: int | None) -> MaxLength:
    """`data.max_length` as it was given; else the model's limit, at most DEFAULT_LENGTH."""
    if given is not None:
        beyond = f", beyond the model's limit of {model}" if model and given > model else ""
        return MaxLength(given, f"data.max_length{beyond}")
    if model is None:
        return MaxLength(DEFAULT_LENGTH, "the default: the model names no limit")
    if model <= DEFAULT_LENGTH:
        return MaxLength(model, "the model's limit")
    return MaxLength(DEFAULT_LENGTH, f"the default; the model's limit is {model}")


def make_report(
    sources: Sequence[SourceReport],
    train: Tokenized,
    evaluation: Tokenized | None,
    *,
    packs: Packs,
    packed: bool,
    max_length: MaxLength,
    sample: DecodedSample,
) -> DataReport:
    """`packs` are those of the first epoch; unpacked, nothing of them is empty."""
    documents = train.documents
    held_out = evaluation.documents if evaluation else None
    tally = Tally()
    tally.add(train.tally)
    if evaluation:
        tally.add(evaluation.tally)
    return DataReport(
        sources=tuple(_with_losses(source, tally) for source in sources),
        documents=len(documents),
        tokens=documents.num_tokens,
        supervised_tokens=documents.num_supervised,
        eval_documents=len(held_out) if held_out else 0,
        eval_tokens=held_out.num_tokens if held_out else 0,
        eval_supervised_tokens=held_out.num_supervised if held_out else 0,
        packs=len(packs),
        waste=packs.waste(documents.lengths, max_length.tokens) if packed else 0.0,
        longest_document=int(documents.lengths.max()),
        max_length=max_length.tokens,
        max_length_reason=max_length.reason,
        cache=_cache_line(train, evaluation),
        sample=sample,
    )


def decode_sample(
    tokenizer: Any, source: str, tokens: np.ndarray, supervised: np.ndarray
) -> DecodedSample:
    """A document (n,) as text, cut wherever supervision begins or ends."""
    pieces = []
    for is_supervised, run in groupby(
        zip(tokens.tolist(), supervised.tolist(), strict=True), _flag
    ):
        text = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        pieces.append((text, is_supervised))
    return DecodedSample(source, tuple(pieces))


def _flag(token: tuple[int, bool]) -> bool:
    return token[1]


def _with_losses(report: SourceReport, tally: Tally) -> SourceReport:
    reasons = tally.reasons(report.name)
    return replace(
        report,
        used=report.used - sum(reasons.values()),
        dropped={**report.dropped, **reasons},
        truncated=report.truncated + tally.truncated[report.name],
        split=report.split + tally.split[report.name],
    )


def _cache_line(train: Tokenized, evaluation: Tokenized | None) -> str:
    """The training data's entry, and the held-out data's where it fared otherwise."""
    both_hit = train.message.startswith("hit") == (evaluation or train).message.startswith("hit")
    if evaluation is None or both_hit:
        return train.message
    return f"{train.message}; held out: {evaluation.message}"
