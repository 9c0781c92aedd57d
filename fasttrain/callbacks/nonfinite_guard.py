"""What happens when a loss or a gradient norm is not finite."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fasttrain.config.schema.callback import NonFiniteGuardConfig
from fasttrain.core.batch import Batch
from fasttrain.core.events import Callback, LogRecord, Result, StepEnd
from fasttrain.runtime.files import write_atomically

if TYPE_CHECKING:
    from fasttrain.core.run import Run

log = logging.getLogger("fasttrain")

MAX_UNREAD = 64  # steps whose batches are held at most, until their flags are read
MAX_KEPT = 20  # batches written by one process: enough to see a pattern, not enough to fill a disk


class NonFiniteGuard(Callback):
    """Acts on steps that the engine skipped, since their loss or norm was not finite.

    The flags stay on the device and are read when a step is logged and before anything is saved, so
    that training does not wait for them. Each offending batch is kept in `nonfinite/`.
    """

    Config = NonFiniteGuardConfig

    def __init__(self, config: Any = None) -> None:
        super().__init__(config or NonFiniteGuardConfig())
        self.in_a_row = 0
        self._recent: list[StepEnd] = []  # steps whose flag was not read yet
        self._kept = 0

    def on_step_end(self, run: Run, record: StepEnd) -> None:
        self._recent.append(record)
        if len(self._recent) >= MAX_UNREAD:
            self.inspect(run)

    def on_log(self, run: Run, record: LogRecord) -> None:
        self.inspect(run)

    def wrap_save_checkpoint(self, run: Run, call: Any, *args: Any) -> Any:
        self.inspect(run)
        return call(*args)

    def on_run_end(self, run: Run, record: Result) -> None:
        self.inspect(run)

    def inspect(self, run: Run) -> None:
        """Read the flags of the steps since the last time, and act as the policy says."""
        recent, self._recent = self._recent, []
        if not recent:
            return
        flags = torch.stack([step.result.skipped for step in recent]).tolist()
        for step, skipped in zip(recent, flags, strict=True):
            self.in_a_row = self.in_a_row + 1 if skipped else 0
            if skipped:
                self._act(run, step)

    def _act(self, run: Run, step: StepEnd) -> None:
        what = f"step {step.step}: {_culprit(step)}"
        log.warning("%s; the weights were not changed. %s.", what, self._keep(run, step))
        if self.config.policy == "stop":
            run.stop(f"{what} (nonfinite_guard, policy stop)", exit_code=1)
        elif self.in_a_row >= self.config.max_skips:
            run.stop(f"{self.in_a_row} steps in a row were not finite", exit_code=1)

    def _keep(self, run: Run, step: StepEnd) -> str:
        if self._kept >= MAX_KEPT:
            return f"Its batch is not kept: there are {MAX_KEPT} in nonfinite/"
        self._kept += 1
        path = batch_path(run, step.step)
        path.parent.mkdir(exist_ok=True)
        text = json.dumps(describe_step(step, run.tokenizer), ensure_ascii=False)
        write_atomically(path, text.encode("utf-8", "replace"))
        return f"Its batch is in {path}"

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.in_a_row = state["in_a_row"]


def batch_path(run: Run, step: int) -> Path:
    """Where the batch of a step is kept; each rank has its own."""
    topology = run.engine.topology
    rank = f"-rank-{topology.rank:04d}" if topology.world_size > 1 else ""
    return run.directory / "nonfinite" / f"step-{step:08d}{rank}.json"


def describe_step(step: StepEnd, tokenizer: Any) -> dict[str, Any]:
    """The step's numbers and its documents, as text and as ids."""
    loss = step.result.loss_sum.item() / max(step.result.num_supervised, 1)
    return {
        "step": step.step,
        "epoch": step.batch.epoch,
        "step_in_epoch": step.batch.step_in_epoch,
        "loss": str(loss),  # as text, since JSON has no NaN
        "grad_norm": str(step.result.grad_norm.item()),
        "micro_batches": [_documents(batch, tokenizer) for batch in step.batch.micro_batches],
    }


def _documents(batch: Batch, tokenizer: Any) -> list[dict[str, Any]]:
    ends = batch.cu_seqlens.tolist()
    ids, labels = batch.input_ids.tolist(), batch.labels.tolist()
    return [
        {
            "source": source,
            "text": tokenizer.decode(ids[start:end]),
            "input_ids": ids[start:end],
            "labels": labels[start:end],
        }
        for source, start, end in zip(batch.sources, ends[:-1], ends[1:], strict=True)
    ]


def _culprit(step: StepEnd) -> str:
    if not math.isfinite(step.result.loss_sum.item()):
        return f"the loss is {step.result.loss_sum.item()}"
    return f"the gradient norm is {step.result.grad_norm.item()}"
