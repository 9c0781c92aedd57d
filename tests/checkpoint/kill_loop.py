"""Kills a process that saves, again and again; run by test_checkpoint_kill.py.

The parent imports torch once and forks: each child goes on from the newest checkpoint, and steps
and saves until it is killed with SIGKILL. What a checkpoint of step n must hold follows from n
alone.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from fasttrain.checkpoint.sharded import ShardedCheckpoint
from fasttrain.config.schema.checkpoint import ShardedCheckpointConfig
from fasttrain.core.engine_interface import NamedSlice
from fasttrain.core.interfaces import Topology

SIZE = 60_000  # elements; large enough that many kills fall into the writing of a file


class Counter:
    """Stands for a run and its engine: weights that are a function of the step."""

    run_id = "killed"
    resolved_config = "seed: 1\n"
    best_step = None

    def __init__(self, directory):
        self.directory, self.step, self.notes = directory, 0, []
        self.engine = self
        self.topology = Topology()

    def state_slices(self):
        for kind in ("model", "optimizer"):
            yield NamedSlice(kind, "w", weights(self.step), (SIZE,))

    def load_slices(self, slices):
        for piece in slices:
            self.loaded = piece.tensor

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]
        assert torch.equal(self.loaded, weights(self.step)), f"wrong weights at step {self.step}"


def weights(step):
    return torch.arange(SIZE, dtype=torch.float32) + step / 7


def child(directory, sharded):
    run = Counter(directory)
    found = sharded.find(directory)
    if found.path is not None:
        sharded.restore(run, found.path)
    while True:
        run.step += 1
        sharded.save(run)


def main(directory, kills, seed):
    sharded = ShardedCheckpoint(ShardedCheckpointConfig(keep=2))
    chance = random.Random(seed)
    last, dirty = 0, 0
    for kill in range(kills):
        pid = os.fork()
        if pid == 0:
            try:
                child(directory, sharded)
            finally:
                os._exit(1)
        time.sleep(chance.uniform(0.0, 0.15))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), f"the process failed by itself at kill {kill}"
        found = sharded.find(directory)
        assert found.skipped == (), found.skipped
        run = SimpleNamespace(step=0)
        if found.path is not None:
            run = Counter(directory)
            sharded.restore(run, found.path)
        assert run.step >= last, f"step {last} was complete, and then only {run.step}"
        last = run.step
        dirty += any(directory.glob("checkpoints/.tmp-*"))
    print(f"{kills} kills, {dirty} with something half-written, {last} steps")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
