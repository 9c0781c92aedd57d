"""Text nobody prepared: `fasttrain run` with a path and no other data option trains on it."""

import json
from pathlib import Path

import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
import pytest
from tiny import CONFIG

import fasttrain
from fasttrain.core.events import Callback

FIXTURES = Path(__file__).parent / "data" / "fixtures"
FORMATS = {
    "toy_chat.jsonl": "messages",
    "vicuna.json": "ShareGPT",
    "tool_calls.json": "ShareGPT",
    "identity.json": "alpaca",
    "super_bowl.jsonl": "prompt",
    "gsm8k.jsonl": "question",
    "shakespeare.txt": "text",
}


class Look(Callback):
    def on_data_ready(self, run, record):
        self.report = record


def train_on(path, directory):
    look = Look()
    data = {"sources": [str(path)], "cache_dir": str(directory / "cache")}
    settings = {**CONFIG, "data": data, "max_steps": 2, "output_dir": str(directory / "run")}
    result = fasttrain.run(settings, callbacks=[look])
    assert result.finished
    assert result.loss > 0
    assert (result.directory / "model" / "model.safetensors").exists()
    (source,) = look.report.sources
    assert source.rows == source.used + sum(source.dropped.values())
    assert look.report.supervised_tokens > 0
    return source


@pytest.mark.parametrize("name", FORMATS)
def test_a_public_dataset_trains_by_its_path(name, tmp_path, capsys):
    source = train_on(FIXTURES / name, tmp_path)
    assert FORMATS[name].lower() in source.detected.lower()
    assert source.detected in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_other_containers(suffix, tmp_path):
    table = pyarrow.json.read_json(FIXTURES / "gsm8k.jsonl")
    path = tmp_path / f"gsm8k{suffix}"
    if suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        pyarrow.parquet.write_table(table, path)
    plain = train_on(FIXTURES / "gsm8k.jsonl", tmp_path / "plain")
    assert train_on(path, tmp_path / "other").used == plain.used


def test_columns_named_by_the_user(tmp_path):
    rows = [json.loads(line) for line in (FIXTURES / "gsm8k.jsonl").read_text().splitlines()]
    path = tmp_path / "odd.jsonl"
    odd = [{"aufgabe": row["question"], "loesung": row["answer"]} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in odd))
    columns = {"prompt": "aufgabe", "response": "loesung"}
    source = {"type": "file", "path": str(path), "columns": columns}
    data = {"sources": [source], "cache_dir": str(tmp_path / "cache")}
    settings = {**CONFIG, "data": data, "max_steps": 1, "output_dir": str(tmp_path / "run")}
    assert fasttrain.run(settings).finished
