"""The user's mistakes: one clear line, exit code 2, before any model is built, nothing harmed."""

import json
import shutil

import pytest
import yaml
from tiny import CONFIG
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fasttrain.cli.app import exit_code
from fasttrain.model.hf import RandomModelFactory

GOOD = {
    "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}]
}
GOOD_LINE = json.dumps(GOOD)


def tokenizer_without(directory, *, eos=None, template=None):
    backend = Tokenizer(models.WordLevel({"hi": 0, "<unk>": 1, "</s>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token=eos, chat_template=template
    )
    tokenizer.save_pretrained(directory)


# name → (files: name → bytes, overrides, what the line must say)
CASES = {
    "unknown key": ({}, ["optimizer.learing_rate=1"], ["learing_rate", "learning_rate"]),
    "wrong type": ({}, ["max_steps=ten"], ["max_steps", "'ten'"]),
    "missing file": ({}, ["data.sources=[nowhere.jsonl]"], ["nowhere.jsonl"]),
    "malformed line": (
        {"bad.jsonl": f"{GOOD_LINE}\n{GOOD_LINE}\n{{'x'\n".encode()},
        ["data.sources=[bad.jsonl]"],
        ["bad.jsonl:3", "JSON"],
    ),
    "another format": (
        {"bad.jsonl": b"PAR1\x00\x00\x15\x04\x15\x10PAR1"},
        ["data.sources=[bad.jsonl]"],
        ["bad.jsonl", "parquet"],
    ),
    "empty file": ({"bad.jsonl": b""}, ["data.sources=[bad.jsonl]"], ["bad.jsonl", "empty"]),
    "missing column": (
        {"bad.jsonl": f"{GOOD_LINE}\n".encode()},
        [
            "data.sources=[{type: file, path: bad.jsonl, "
            "columns: {prompt: question, response: answer}}]"
        ],
        ["question", "messages"],
    ),
    "not UTF-8": (
        {"bad.jsonl": GOOD_LINE.encode() + b'\n{"messages": "\xff"}\n'},
        ["data.sources=[bad.jsonl]"],
        ["bad.jsonl:2", "UTF-8"],
    ),
    "no chat template": (
        {"tok": {"eos": "</s>"}},
        ["tokenizer={type: huggingface, name_or_path: ./tok}"],
        ["chat template"],
    ),
    "no eos": (
        {"tok": {"template": "{{ messages }}"}},
        ["tokenizer={type: huggingface, name_or_path: ./tok}"],
        ["eos"],
    ),
    "max_length 0": ({}, ["data.max_length=0"], ["data.max_length", "0"]),
    "a warm-up longer than the epoch": (
        {},
        ["max_steps=null", "scheduler={type: cosine, warmup_steps: 99}"],
        ["scheduler.warmup_steps", "99"],
    ),
    "unwritable output": ({"file": b"x"}, ["output_dir=file/run"], ["output_dir"]),
    "no assistant turn": (
        {"bad.jsonl": b'{"messages": [{"role": "user", "content": "hi"}]}\n'},
        ["data.sources=[bad.jsonl]"],
        ["bad.jsonl:1"],
    ),
}


def snapshot(directory):
    files = [p for p in sorted(directory.rglob("*")) if p.is_file() and "cache" not in p.parts]
    return {path: path.read_bytes() for path in files}


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    (tmp_path / "chats.jsonl").write_text((GOOD_LINE + "\n") * 8)
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump({**CONFIG, "output_dir": "run"}))
    monkeypatch.chdir(tmp_path)

    def never(*args, **kwargs):
        raise AssertionError("a model was built")

    monkeypatch.setattr(RandomModelFactory, "build", never)
    return tmp_path


@pytest.mark.parametrize("name", CASES)
def test_one_clear_line_before_any_model(name, workspace, capsys):
    files, overrides, said = CASES[name]
    for file, content in files.items():
        if isinstance(content, bytes):
            (workspace / file).write_bytes(content)
        else:
            tokenizer_without(workspace / file, **content)
    before = snapshot(workspace)
    assert exit_code(["run", "sft.yaml", *overrides]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 2, lines  # bad rows are named, then counted
    assert all(line.startswith("fasttrain: error: ") for line in lines)
    for words in said:
        assert words.lower() in lines[0].lower(), lines[0]
    after = snapshot(workspace)
    assert {path: after.get(path) for path in before} == before
    # What a refused start leaves behind must not stand in the way of the next one.
    assert all("run" in path.parts for path in after.keys() - before.keys())


def test_a_refused_start_does_not_block_the_mended_one(workspace, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.chdir(workspace)
    (workspace / "bad.jsonl").write_bytes(b"")
    assert exit_code(["run", "sft.yaml", "data.sources=[bad.jsonl]"]) == 2
    assert exit_code(["run", "sft.yaml"]) == 0, capsys.readouterr().err


def test_several_problems_are_told_at_once(workspace, capsys):
    text = (workspace / "sft.yaml").read_text() + "sed: 1\nepochs: many\n"
    (workspace / "sft.yaml").write_text(text)
    assert exit_code(["run", "sft.yaml", "data.max_length=0"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert any("seed" in line and "sft.yaml:" in line for line in lines)


def test_a_directory_of_another_run_is_left_alone(workspace, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.chdir(workspace)
    assert exit_code(["run", "sft.yaml"]) == 0
    before = snapshot(workspace)
    shutil.rmtree(workspace / "cache", ignore_errors=True)
    capsys.readouterr()
    assert exit_code(["run", "sft.yaml", "optimizer.learning_rate=1"]) == 2
    assert "output_dir" in capsys.readouterr().err
    after = snapshot(workspace)
    assert {path: after[path] for path in before} == before
