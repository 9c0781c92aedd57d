"""What the user is told about the data before training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class DecodedSample:
    """One training document as text, cut into pieces that are supervised or not."""

    source: str
    pieces: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class SourceReport:
    """How one source was read."""

    name: str
    detected: str  # "conversations (column messages)", "alpaca (instruction, input, output)", …
    rows: int
    used: int
    dropped: Mapping[str, int] = field(default_factory=dict)  # reason → rows
    truncated: int = 0  # documents that lost their tail
    split: int = 0  # plain texts that became several documents


@dataclass(frozen=True)
class DataReport:
    """What the user is told about the data before training."""

    sources: tuple[SourceReport, ...]
    documents: int
    tokens: int
    supervised_tokens: int
    eval_documents: int
    eval_tokens: int
    eval_supervised_tokens: int
    packs: int  # of the first epoch
    waste: float  # share of the first epoch's packs that is empty
    longest_document: int
    max_length: int
    max_length_reason: str
    cache: str  # "hit: …" or "miss: …"
    sample: DecodedSample
