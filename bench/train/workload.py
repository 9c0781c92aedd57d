"""What is trained in the comparison: one model, one set of chats, one number of steps.

Read by every contender, in whatever environment it runs: standard library only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "runs" / "bench-train"  # what is made for a comparison, and its logs


@dataclass(frozen=True)
class Workload:
    """Sizes of one comparison. `pack_tokens` is 0 until the chats are made and counted."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    chats: int  # of one epoch
    rows: int  # chats in a padded batch, which is one optimizer step
    warmup: int  # optimizer steps at the start that are not measured
    steps: int  # optimizer steps that are measured
    length_scale: float = 1.0  # of the chats' length profile (chat_data.py)
    learning_rate: float = 3e-4
    # Tokens of a pack, and the sequence limit of every contender: what `rows` chats hold on
    # average, so that an optimizer step sees as many tokens packed as padded.
    pack_tokens: int = 0

    @property
    def total_steps(self) -> int:
        return self.warmup + self.steps

    def save(self, folder: Path) -> None:
        (folder / "workload.json").write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Workload:
        return cls(**json.loads((folder / "workload.json").read_text()))


WORKLOADS = {
    workload.name: workload
    for workload in (
        # 33.8M parameters: what two CPU cores train at a few seconds a step.
        Workload(
            "cpu",
            hidden=512,
            intermediate=1376,
            layers=6,
            heads=8,
            kv_heads=4,
            vocab=32000,
            chats=2000,
            rows=8,
            warmup=2,
            steps=20,
        ),
        # 222M parameters and 8k tokens a step: enough for a GPU to be busy, not waiting for Python.
        Workload(
            "gpu",
            hidden=1024,
            intermediate=2816,
            layers=16,
            heads=16,
            kv_heads=8,
            vocab=32000,
            chats=8000,
            rows=40,
            warmup=5,
            steps=50,
        ),
        # Tries the harness out. Its figures mean nothing.
        Workload(
            "quick",
            hidden=64,
            intermediate=128,
            layers=2,
            heads=4,
            kv_heads=2,
            vocab=2048,
            chats=64,
            rows=8,
            warmup=1,
            steps=3,
            length_scale=0.25,
        ),
    )
}
