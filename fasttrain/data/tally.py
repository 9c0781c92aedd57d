"""What became of rows that were not used whole, counted by source and reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Tally:
    """Rows that were dropped, and documents that were cut."""

    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)  # (source, reason) → rows
    first: dict[tuple[str, str], str] = field(default_factory=dict)  # … → origin of the first
    truncated: Counter[str] = field(default_factory=Counter)  # source → documents
    split: Counter[str] = field(default_factory=Counter)  # source → texts made into several

    def drop(self, source: str, reason: str, origin: str) -> None:
        """Count one row that is left out."""
        self.dropped[source, reason] += 1
        self.first.setdefault((source, reason), origin)

    def add(self, other: Tally) -> None:
        """Count what `other`, of later rows, counted."""
        self.dropped.update(other.dropped)
        self.truncated.update(other.truncated)
        self.split.update(other.split)
        self.first = {**other.first, **self.first}

    def reasons(self, source: str) -> dict[str, int]:
        """Why rows of a source were dropped, with the first row of each reason → how many."""
        return {
            f"{reason} (first: {self.first[name, reason]})": count
            for (name, reason), count in self.dropped.items()
            if name == source
        }

    def as_json(self) -> dict[str, Any]:
        dropped = [[*key, count, self.first[key]] for key, count in self.dropped.items()]
        return {"dropped": dropped, "truncated": dict(self.truncated), "split": dict(self.split)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Tally:
        tally = cls(truncated=Counter(values["truncated"]), split=Counter(values["split"]))
        for source, reason, count, origin in values["dropped"]:
            tally.dropped[source, reason] = count
            tally.first[source, reason] = origin
        return tally
