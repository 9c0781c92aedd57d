"""A run that is killed and started again by the same command is the run that was never killed."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
RUN = Path("runs/sft")
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "seven", "wizards"]

# Dropout draws random numbers at every step; 3 and 7 meet neither each other nor an epoch's end.
CONFIG = {
    "model": {
        "type": "random",
        "config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "attention_dropout": 0.1,
            "max_position_embeddings": 128,
        },
    },
    "tokenizer": {"type": "trained", "vocab_size": 320, "chat_template": "chatml"},
    "data": {"sources": ["chats.jsonl"], "max_length": 128, "eval_split": 0.1},
    "engine": {"device": "cpu"},
    "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1},
    "scheduler": {"type": "cosine", "warmup_steps": 5},
    "checkpoint": [{"type": "sharded", "every_steps": 3}, {"type": "huggingface"}],
    "eval": {"every_steps": 7},
    "logging": {"every_steps": 1},
}
# What DESIGN calls the same run; speed and memory may differ.
FIELDS = (
    "step", "epoch", "loss", "lr", "grad_norm", "tokens", "supervised_tokens", "eval_loss",
)  # fmt: skip


class Workplace:
    """A directory with a config and data, in which the command is given."""

    def __init__(self, directory: Path, **changes):
        directory.mkdir()
        self.directory = directory
        self.run = directory / RUN
        (directory / "sft.yaml").write_text(yaml.safe_dump({**CONFIG, **changes}))
        chance = random.Random(0)
        rows = [
            {"prompt": sentence(chance, 12), "completion": sentence(chance, 15)} for _ in range(60)
        ]
        (directory / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(self) -> subprocess.Popen:
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT}/kernels",
            "OMP_NUM_THREADS": "1",
            "FASTTRAIN_CACHE": str(self.directory / "cache"),
        }
        return subprocess.Popen(
            [sys.executable, "-m", "fasttrain", "run", "sft.yaml"],
            cwd=self.directory,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def stop_at(self, step: int, number: signal.Signals) -> tuple[int, str]:
        """Start, send the signal once `step` is logged; the exit code, and what was said."""
        process = self.start()
        while process.poll() is None and self.last_step() < step:
            time.sleep(0.002)
        process.send_signal(number)
        said, _ = process.communicate()
        return process.returncode, said

    def last_step(self) -> int:
        try:
            lines = (self.run / "metrics.jsonl").read_text().splitlines()
            return json.loads(lines[-1])["step"]
        except (FileNotFoundError, IndexError, ValueError):
            return 0

    def rows(self) -> list[tuple]:
        lines = (self.run / "metrics.jsonl").read_text().splitlines()
        return [tuple(json.loads(line).get(name) for name in FIELDS) for line in lines]

    def sums(self) -> dict[str, str]:
        """SHA-256 of the exported weights, and of all that the last checkpoint holds of tensors."""
        newest = max((self.run / "checkpoints").glob("step-*"))
        files = [self.run / "model" / "model.safetensors", *newest.glob("rank-*/*")]
        return {file.name: sha256(file.read_bytes()).hexdigest() for file in files}


def sentence(chance: random.Random, most: int) -> str:
    return " ".join(chance.choices(WORDS, k=chance.randint(3, most)))


def resumed_at(said: str) -> list[int]:
    """The step that a start went on from, if it did."""
    return [int(step) for step in re.findall(r"goes on in runs/sft, from step-(\d+)", said)]


# Without accumulation an epoch is 24 steps, with 4 micro-batches it is 6. The first signal falls
# into the first epoch, the second into a later one, far from the end: a run may outrun its signal.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("accumulation", "steps", "first", "second"),
    [
        (1, 120, (8, 20, signal.SIGKILL), (32, 44, signal.SIGTERM)),
        (4, 40, (3, 5, signal.SIGTERM), (9, 14, signal.SIGKILL)),
    ],
)
def test_a_killed_run_becomes_the_uninterrupted_one(tmp_path, accumulation, steps, first, second):
    changes = {"gradient_accumulation_steps": accumulation, "max_steps": steps}
    whole, killed = (Workplace(tmp_path / name, **changes) for name in ("whole", "killed"))
    uninterrupted = whole.start()
    chance = random.Random(accumulation)
    resumed, reached = [], []
    for earliest, latest, number in (first, second):
        code, said = killed.stop_at(chance.randint(earliest, latest), number)
        reached.append(killed.last_step())
        assert reached[-1] < steps, "the run was over before the signal came"
        if number == signal.SIGTERM:
            assert code == 128 + signal.SIGTERM, said
            assert "signal SIGTERM" in said
            assert f"saved runs/sft/checkpoints/step-{reached[-1]:08d}" in said
        else:
            assert code == -signal.SIGKILL
        resumed += resumed_at(said)
    last = killed.start()
    said, _ = last.communicate()
    assert last.returncode == 0, said
    resumed += resumed_at(said)

    assert len(resumed) == 2, "each start but the first goes on"
    for step, at, (*_, number) in zip(reached, resumed, (first, second), strict=True):
        assert at == step if number == signal.SIGTERM else 0 <= step - at <= 3
    epochs = [next(row[1] for row in killed.rows() if row[0] == at) for at in resumed]
    assert epochs[-1] > 1 and any(epoch % 1 for epoch in epochs)

    said, _ = uninterrupted.communicate()
    assert uninterrupted.returncode == 0, said
    assert killed.rows() == whole.rows()
    logged = [row[0] for row in killed.rows() if row[2] is not None]
    assert logged == list(range(1, steps + 1))
    assert killed.sums() == whole.sums()
