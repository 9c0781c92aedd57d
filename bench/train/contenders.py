"""Who takes part: a name, one sentence of what it is, and the process that runs it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from workload import ROOT

HERE = Path(__file__).parent
PEERS = ROOT / ".bench-peers"


@dataclass(frozen=True)
class Contender:
    """One trainer in one setting. `python` is the interpreter whose environment has it."""

    name: str
    what: str
    script: str
    variant: str
    peer: str = ""  # its environment under .bench-peers/; empty: the present one

    @property
    def python(self) -> Path:
        return PEERS / self.peer / "bin" / "python" if self.peer else Path(sys.executable)

    def missing(self) -> str | None:
        """Why it can't take part here, or None."""
        if self.python.exists():
            return None
        return f"{self.python.relative_to(ROOT)} is not there; `make bench-peers` installs it"

    def command(self, folder: Path, output: Path, seed: int, threads: int) -> list[str]:
        return [
            *(str(self.python), str(HERE / self.script)),
            *("--folder", str(folder), "--output", str(output), "--variant", self.variant),
            *("--seed", str(seed), "--threads", str(threads)),
        ]


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(
            "fasttrain",
            "fasttrain, packed, its kernels chosen by itself",
            "with_fasttrain.py",
            "auto",
        ),
        Contender(
            "fasttrain-eager",
            "fasttrain, packed, no kernels",
            "with_fasttrain.py",
            "eager",
        ),
        Contender(
            "trainer",
            "transformers' Trainer, padded batches of rows drawn at random",
            "with_trainer.py",
            "padded",
        ),
        Contender(
            "trainer-grouped",
            "transformers' Trainer, padded batches of like length (group_by_length)",
            "with_trainer.py",
            "grouped",
        ),
        Contender("trl", "TRL's SFTTrainer, padded batches", "peers.py", "trl", "trl"),
        Contender(
            "trl-packed",
            "TRL's SFTTrainer, packing bfd",
            "peers.py",
            "trl-packed",
            "trl",
        ),
        Contender(
            "arctic-packed",
            "ArcticTraining, pack_samples, ZeRO 0",
            "peers.py",
            "arctic-packed",
            "arctic",
        ),
    )
}
# What shares our environment.
AT_HOME = tuple(name for name, contender in CONTENDERS.items() if not contender.peer)
AWAY = ("fasttrain", *(name for name, contender in CONTENDERS.items() if contender.peer))
