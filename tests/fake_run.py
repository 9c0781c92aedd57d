"""A run that is all there but does not train, for what looks at runs."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from toys import ToyModel, batch_of, document, step_batch

from fasttrain.config.schema.run import EvalConfig, LoggingConfig
from fasttrain.core.batch import StepResult
from fasttrain.core.data_report import DataReport, DecodedSample, SourceReport
from fasttrain.core.events import EvaluationRecord, Hooks, LogRecord, Result, StepEnd
from fasttrain.core.interfaces import PreparedData, Topology
from fasttrain.core.run import Run

LETTERS = "abcdefghijklmnopqrstuvwxyz."


class Letters:
    """A tokenizer whose ids are letters; 27 of them, the last one a dot."""

    chat_template = None

    def get_vocab(self):
        return {letter: index for index, letter in enumerate(LETTERS)}

    def decode(self, ids):
        return "".join(LETTERS[i] for i in ids)


class LettersTrain:
    """Training data in which each letter of abc is a target as often as its place says."""

    def steps_in_epoch(self, epoch):
        return 10

    def token_counts(self, vocab_size):
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        counts[:3] = torch.tensor([1, 2, 3])
        return counts


class LettersHeldOut:
    """Two batches; of the five supervised labels two are b and three are c."""

    def batches(self):
        yield batch_of(document([0, 1, 1]))
        yield batch_of(document([0, 2]), document([0, 2, 2]))

    def prompts(self, count):
        return [("ask\n", "say"), ("why\n", "so")][:count]


def report(**changes) -> DataReport:
    values = {
        "sources": (
            SourceReport(
                name="chats.jsonl",
                detected="conversations (column messages)",
                rows=1200,
                used=1180,
                dropped={"empty": 12, "nothing to learn": 8},
                truncated=3,
            ),
        ),
        "documents": 1180,
        "tokens": 1_234_567,
        "supervised_tokens": 600_000,
        "eval_documents": 40,
        "eval_tokens": 41_000,
        "eval_supervised_tokens": 20_500,
        "packs": 160,
        "waste": 0.0123,
        "longest_document": 2048,
        "max_length": 8192,
        "max_length_reason": "the model's limit is 131072, capped at 8192",
        "cache": "miss: ~/.cache/fasttrain/0a1b",
        "sample": DecodedSample(
            source="chats.jsonl",
            pieces=(("<user>\nTwo and two?\n<answer>", False), ("Four.\x1b[2J<end>", True)),
        ),
    }
    return DataReport(**{**values, **changes})


def make_run(directory: Path, **changes) -> Run:
    config = SimpleNamespace(type="sft", logging=LoggingConfig(), eval=EvalConfig())
    values = {
        "config": config,
        "directory": directory,
        "hooks": Hooks(),
        "run_id": "test",
        "engine": SimpleNamespace(
            topology=Topology(), device=torch.device("cpu"), evaluation_weights=nullcontext
        ),
        "data": PreparedData(LettersTrain(), LettersHeldOut(), report(), (3,), "letters"),
        "tokenizer": Letters(),
        "model": ToyModel(vocab_size=27),
        "total_steps": 4000,
    }
    return Run(**{**values, **changes})


def log_record(step: int = 120, **changes) -> LogRecord:
    values = {
        "step": step,
        "epoch": 0.5,
        "loss": 1.2344,
        "lr": 1.9e-5,
        "grad_norm": 0.814,
        "tokens": 10_000,
        "supervised_tokens": 9_000,
        "tokens_per_second": 41_234.5,
        "step_seconds": 0.25,
        "peak_memory_bytes": 1_503_238_553,
    }
    return LogRecord(**{**values, **changes})


def evaluation(step: int, loss: float, *, is_best: bool = True) -> EvaluationRecord:
    return EvaluationRecord(step, loss, 24_000, 3.14, is_best)


def step_end(step: int, *, loss: float = 2.0, norm: float = 1.0, skipped: bool = False) -> StepEnd:
    """A step over the documents `abc` and `de`, the last two letters of each supervised."""
    batch = batch_of(document([0, 1, 2], [False, True, True]), document([3, 4]))
    result = StepResult(
        loss_sum=torch.tensor(loss),
        num_supervised=3,
        num_tokens=5,
        grad_norm=torch.tensor(norm),
        skipped=torch.tensor(skipped),
    )
    return StepEnd(step, step_batch(batch, step=step - 1), result)


def result(directory: Path, **changes) -> Result:
    values = {
        "directory": directory,
        "step": 4000,
        "loss": 1.2344,
        "eval_loss": 1.4,
        "reason": "all 4000 steps are done",
        "finished": True,
        "exit_code": 0,
    }
    return Result(**{**values, **changes})
