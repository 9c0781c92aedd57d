"""The contender: fasttrain, through its public API and the config beside this file.

A callback times the steps with the stopwatch that times every contender. What the run wrote into
its metrics.jsonl about the same steps must agree. `auto` lets fasttrain choose its kernels,
`logits` has it make logits instead of fusing the head with the loss, `eager` has it use no kernel.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from measure import BatchCount, Job, Stopwatch, read_job, report, throughput

import fasttrain
from fasttrain.core.batch import Batch
from fasttrain.core.events import Callback, Result, StepEnd
from fasttrain.core.run import Run

CONFIG = Path(__file__).with_name("fasttrain.yaml")
VARIANTS = {
    "auto": {},
    "logits": {"kernels.linear_cross_entropy": "eager"},
    "eager": {"kernels.mode": "eager"},
}
CLOCKS_AGREE = 0.05  # relative: the run's clock also counts the logging between steps


class Observer(Callback):
    """Notes the time and the tokens of every step, and keeps the first one's documents and loss."""

    def __init__(self, watch: Stopwatch, capacity: int) -> None:
        super().__init__(None)
        self.watch = watch
        self.capacity = capacity  # tokens of a full pack
        self.counts: list[BatchCount] = []
        self.first: StepEnd | None = None
        self.epoch_tokens = 0
        self.epoch_supervised_tokens = 0

    def on_step_end(self, run: Run, record: StepEnd) -> None:
        self.first = self.first or record
        packs = record.batch.micro_batches
        self.counts.append(
            BatchCount(
                tokens=record.result.num_tokens,
                supervised=record.result.num_supervised,
                # A pack is not filled up with padding: what it could have held is not computed.
                cells=record.result.num_tokens,
            )
        )
        assert all(pack.num_tokens <= self.capacity for pack in packs)
        self.watch.step_ended(run.total_steps)

    def on_run_end(self, run: Run, record: Result) -> None:
        self.epoch_tokens = run.data.report.tokens
        self.epoch_supervised_tokens = run.data.report.supervised_tokens


def overrides(job: Job) -> dict[str, Any]:
    """What the workload decides."""
    workload = job.workload
    return {
        "model.name_or_path": job.model,
        "data.sources": [job.chats],
        "data.max_length": workload.pack_tokens,
        "data.cache_dir": str(job.folder / "cache"),
        "optimizer.learning_rate": workload.learning_rate,
        "max_steps": workload.total_steps,
        "logging.every_steps": workload.warmup,
        **VARIANTS[job.variant],
        "seed": job.seed,
        "output_dir": str(job.output / "run"),
    }


def documents(batch: Batch) -> list[dict[str, list[int]]]:
    """The batch's documents as ids and labels; a label is the target of its own position."""
    bounds = batch.cu_seqlens.tolist()
    return [
        {"input_ids": batch.input_ids[a:b].tolist(), "targets": batch.labels[a:b].tolist()}
        for a, b in pairwise(bounds)
    ]


def from_metrics(path: Path, warmup: int) -> dict[str, Any]:
    """Throughput of the logged intervals after the warm-up, which is the first of them."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps[0] == warmup, f"the first interval ends at step {steps[0]}, not {warmup}"
    seconds = sum(
        line["step_seconds"] * (line["step"] - before)
        for before, line in zip(steps, lines[1:], strict=False)
    )
    tokens = sum(line["tokens"] for line in lines[1:])
    supervised = sum(line["supervised_tokens"] for line in lines[1:])
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "supervised_tokens_per_second": supervised / seconds,
        "peak_memory_bytes_logged": lines[-1]["peak_memory_bytes"],
        "final_loss": lines[-1]["loss"],
    }


def main() -> None:
    job = read_job(tuple(VARIANTS))
    observer = Observer(Stopwatch(job.workload.warmup), job.workload.pack_tokens)
    result = fasttrain.run(CONFIG, overrides(job), callbacks=[observer])
    timed = throughput(observer.counts, observer.watch)
    logged = from_metrics(result.directory / "metrics.jsonl", job.workload.warmup)
    assert logged["tokens"] == timed["tokens"], "metrics.jsonl counts other tokens than the batches"
    disagreement = abs(logged["seconds"] / timed["seconds"] - 1)
    assert disagreement < CLOCKS_AGREE, (
        f"metrics.jsonl says {logged['seconds']:.3f} s where the wall clock says "
        f"{timed['seconds']:.3f} s"
    )
    first = observer.first
    assert first is not None
    first_loss = first.result.loss_sum.item() / first.result.num_supervised
    documents_seen = [
        document for pack in first.batch.micro_batches for document in documents(pack)
    ]
    (job.output / "first_step.json").write_text(
        json.dumps({"loss": first_loss, "documents": documents_seen})
    )
    report(
        **{**logged, **timed},
        clocks_disagree_by=disagreement,
        epoch_tokens=observer.epoch_tokens,
        epoch_supervised_tokens=observer.epoch_supervised_tokens,
        first_loss=first_loss,
        kernels=json.loads((result.directory / "kernels.json").read_text())["rows"],
    )


if __name__ == "__main__":
    main()
