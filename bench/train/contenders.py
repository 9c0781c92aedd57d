"""Who takes part: a name, one sentence of what it is, and the process that runs it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from workload import ROOT

HERE = Path(__file__).parent
PEERS = ROOT / ".bench-peers"


def from_root(path: Path) -> str:
    """As one writes it from the root of the repository; a path elsewhere stays whole."""
    # Not resolved: .venv/bin/python is a link, and what it links to has no packages.
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


@dataclass(frozen=True)
class Contender:
    """One trainer in one setting. `python` is the interpreter whose environment has it."""

    name: str
    what: str
    script: str
    variant: str
    peer: str = ""  # its environment under .bench-peers/; empty: the present one
    variables: Mapping[str, str] = field(default_factory=dict)  # what its process sees besides

    @property
    def python(self) -> Path:
        return PEERS / self.peer / "bin" / "python" if self.peer else Path(sys.executable)

    def missing(self) -> str | None:
        """Why it can't take part here, or None."""
        if self.python.exists():
            return None
        return f"{self.python.relative_to(ROOT)} is not there; `make bench-peers` installs it"

    def command(self, folder: Path, output: Path, seed: int, threads: int) -> list[str]:
        """The command line, to be run from the root of the repository."""
        return [
            *(from_root(self.python), from_root(HERE / self.script)),
            *("--folder", from_root(folder), "--output", from_root(output)),
            *("--variant", self.variant),
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
            "fasttrain-logits",
            "fasttrain, packed, its kernels but for the head, which makes logits",
            "with_fasttrain.py",
            "logits",
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
        Contender("trl", "TRL's SFTTrainer, padded batches", "with_trl.py", "padded", "trl"),
        Contender(
            "trl-packed",
            "TRL's SFTTrainer, packing bfd",
            "with_trl.py",
            "packed",
            "trl",
        ),
        Contender(
            "arctic-packed",
            "ArcticTraining, pack_samples, ZeRO 0",
            "with_arctic.py",
            "packed",
            "arctic",
            # A process group of one, without a launcher.
            {
                "RANK": "0",
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "0",
            },
        ),
    )
}
# What shares our environment.
AT_HOME = tuple(name for name, contender in CONTENDERS.items() if not contender.peer)
AWAY = ("fasttrain", *(name for name, contender in CONTENDERS.items() if contender.peer))
