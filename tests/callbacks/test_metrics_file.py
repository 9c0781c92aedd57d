"""metrics.jsonl: exact, strict, whole."""

import json
from types import SimpleNamespace

import pytest
import torch
from fake_run import evaluation, log_record, make_run, result

from fasttrain.callbacks.metrics_file import MetricsFile
from fasttrain.config.errors import UserError
from fasttrain.core.interfaces import Topology

FIELDS = [
    "step", "epoch", "loss", "lr", "grad_norm", "tokens", "supervised_tokens",
    "tokens_per_second", "step_seconds", "peak_memory_bytes",
]  # fmt: skip


def lines(directory):
    text = (directory / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def test_a_logged_step_is_a_line_with_the_ten_fields_and_the_extras(tmp_path):
    run, metrics = make_run(tmp_path), MetricsFile()
    metrics.on_log(run, log_record(10))
    metrics.on_log(run, log_record(20, skipped_steps=2, extras={"accuracy": 0.5}))
    first, second = lines(tmp_path)
    assert list(first) == FIELDS
    assert list(second) == [*FIELDS, "skipped_steps", "accuracy"]
    assert second["skipped_steps"] == 2


def test_lines_are_on_the_disk_before_the_run_ends(tmp_path):
    run, metrics = make_run(tmp_path), MetricsFile()
    metrics.on_log(run, log_record(10))
    assert len(lines(tmp_path)) == 1


def test_floats_are_read_back_to_the_same_bits(tmp_path):
    loss = torch.tensor(0.1, dtype=torch.float32).item() / 3
    metrics = MetricsFile()
    metrics.on_log(make_run(tmp_path), log_record(loss=loss))
    assert lines(tmp_path)[0]["loss"] == loss


def test_an_evaluation_is_a_line_of_its_own(tmp_path):
    metrics = MetricsFile()
    metrics.on_evaluation_end(make_run(tmp_path), evaluation(200, 1.25))
    assert lines(tmp_path) == [
        {"step": 200, "eval_loss": 1.25, "eval_supervised_tokens": 24_000, "eval_seconds": 3.14}
    ]


def test_what_is_not_finite_is_null_so_that_any_json_reader_reads_it(tmp_path):
    run, metrics = make_run(tmp_path), MetricsFile()
    metrics.on_log(run, log_record(loss=float("nan"), grad_norm=float("inf")))
    metrics.on_evaluation_end(run, evaluation(1, float("nan")))
    logged, evaluated = lines(tmp_path)
    assert (logged["loss"], logged["grad_norm"], evaluated["eval_loss"]) == (None, None, None)


def test_a_second_process_of_the_run_appends(tmp_path):
    run = make_run(tmp_path)
    for step in (10, 20):
        metrics = MetricsFile()
        metrics.on_log(run, log_record(step))
        metrics.on_run_end(run, result(tmp_path))
    assert [line["step"] for line in lines(tmp_path)] == [10, 20]


def test_only_the_first_rank_writes(tmp_path):
    engine = SimpleNamespace(topology=Topology(rank=1, world_size=2))
    metrics = MetricsFile()
    metrics.on_log(make_run(tmp_path, engine=engine), log_record())
    assert list(tmp_path.iterdir()) == []


def test_an_extra_may_not_hide_a_field(tmp_path):
    with pytest.raises(UserError, match=r"LossSum\.extras: .*'loss'"):
        MetricsFile().on_log(make_run(tmp_path), log_record(extras={"loss": 1.0}))
