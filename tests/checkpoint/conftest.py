"""Runs that are all there, with a toy model and a real optimizer, for checkpoints to save."""

from types import SimpleNamespace

import pytest
import torch
from toys import ToyModel, batch_of, document

from fasttrain.checkpoint.sharded import ShardedCheckpoint
from fasttrain.config.schema.checkpoint import ShardedCheckpointConfig
from fasttrain.config.schema.engine import LocalEngineConfig
from fasttrain.config.schema.optimizer import AdamWConfig
from fasttrain.config.schema.scheduler import CosineConfig
from fasttrain.core.batch import LossSum
from fasttrain.core.events import Hooks
from fasttrain.core.kernel_plan import KernelPlan
from fasttrain.core.parameter_groups import parameter_groups
from fasttrain.core.run import Run
from fasttrain.engine.local import LocalEngine
from fasttrain.optimizer.adamw import AdamWFactory
from fasttrain.runtime.precision import choose_precision
from fasttrain.scheduler.cosine import CosineFactory

CPU = torch.device("cpu")
CONFIG = "seed: 42  # default\n"


class RunMaker:
    """Makes runs in one directory and trains them for a step at a time."""

    def __init__(self, directory):
        self.directory = directory

    def __call__(self, *, seed=0, dtype=torch.float32, run_id="run-a", directory=None):
        model = ToyModel(seed=seed).to(dtype)
        precision = choose_precision("fp32", CPU)
        config = AdamWConfig(learning_rate=0.1, weight_decay=0.1)
        optimizer = AdamWFactory(config).build(
            parameter_groups(model, config), plan=KernelPlan(), precision=precision
        )
        engine = LocalEngine(LocalEngineConfig(), precision=precision, device=CPU)
        engine.attach(model, optimizer, max_grad_norm=1.0, hooks=Hooks())
        return Run(
            config=SimpleNamespace(),
            directory=directory or self.directory,
            hooks=Hooks(),
            run_id=run_id,
            resolved_config=CONFIG,
            engine=engine,
            data=SimpleNamespace(fingerprint="toy"),
            model=model,
            optimizer=optimizer,
            scheduler=CosineFactory(CosineConfig()).build(optimizer, total_steps=100),
            total_steps=100,
        )

    def train(self, run, steps=1):
        """Optimizer steps on batches that depend on the random state alone."""
        for _ in range(steps):
            batch = batch_of(document(torch.randint(11, (8,)).tolist()))
            run.engine.train_step(
                [batch], lambda batch: LossSum(run.model.token_losses(batch), batch.num_supervised)
            )
            run.scheduler.step()
            run.step += 1
            run.tokens += 8
        return run

    def saved(self, steps, *, keep=2, run=None):
        """A run that was saved after each of `steps`, and the paths."""
        run = run or self()
        checkpoint = ShardedCheckpoint(ShardedCheckpointConfig(keep=keep))
        paths = []
        for step in steps:
            self.train(run, step - run.step)
            paths.append(checkpoint.save(run))
        return run, paths


@pytest.fixture
def runs(tmp_path):
    return RunMaker(tmp_path)


@pytest.fixture
def sharded():
    return ShardedCheckpoint(ShardedCheckpointConfig(keep=2))


def tensors_of(run):
    """Every tensor that a checkpoint keeps, by kind and name."""
    return {
        (piece.kind, piece.name): piece.tensor.detach().clone()
        for piece in run.engine.state_slices()
    }


@pytest.fixture(name="tensors_of")
def tensors_of_fixture():
    return tensors_of
