"""`fasttrain run` as it is typed, on forty rows and a model of 30k parameters."""

import json

import pytest

from fasttrain.cli import app
from fasttrain.runtime import log

CONFIG = """
model:
  type: random
  architecture: llama
  config: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
           num_key_value_heads: 1, max_position_embeddings: 128}
tokenizer: {type: trained, vocab_size: 320, chat_template: chatml}
data: {sources: [rows.jsonl], eval_split: 0.2, max_length: 64, num_workers: 1}
optimizer: {learning_rate: 1e-2}
max_steps: 4
micro_batch_size: 2
eval: {every_steps: 2}
logging: {every_steps: 2}
callbacks: [{type: samples, num_prompts: 1, max_new_tokens: 4}, unigram_baseline]
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A directory with sft.yaml and its data, as the present directory."""
    rows = [{"prompt": f"What is {n} + 1?", "response": f"It is {n + 1}."} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sft.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(log, "_output", None)
    for module in ("run", "generate", "kernels"):
        monkeypatch.setattr(f"fasttrain.cli.{module}.quiet_third_parties", lambda: None)
    yield tmp_path
    log.LOGGER.handlers.clear()


def sections(text):
    """What the screen says under each label."""
    found, label = {}, None
    for line in text.splitlines():
        head, rest = line[:11], line[11:]
        label = head.strip() if head.strip() else label
        found.setdefault(label, []).append(rest)
    return found


def test_a_dry_run_shows_the_first_screen_and_leaves_nothing_in_the_run_directory(project, capsys):
    assert app.exit_code(["run", "sft.yaml", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    screen = sections(shown.out)
    for label in ("data", "sample", "model", "kernels", "optimizer", "plan", "done"):
        assert label in screen, label
    assert len(shown.out.splitlines()) <= 40
    assert any(line.startswith("»") for line in screen["sample"])
    plan = {line.split()[0] for line in screen["plan"]}
    assert {"engine", "precision", "batch", "horizon", "run"} <= plan
    assert not (project / "runs").exists()


def test_a_run_prints_its_progress_and_what_to_do_next_and_the_model_answers(project, capsys):
    assert app.exit_code(["run", "sft.yaml", "seed=7"]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert shown.err == ""
    for step in (2, 4):
        assert any(line.startswith(f"step {step}/4 · loss ") for line in lines)
        assert any(line.startswith(f"step {step} · held-out loss ") for line in lines)
    assert any("a unigram model's" in line for line in lines)
    assert lines[-1] == 'next       fasttrain generate runs/sft "your prompt"'
    assert {path.name for path in (project / "runs" / "sft").iterdir()} >= {
        "metrics.jsonl", "loss.png", "kernels.json", "config.resolved.yaml", "checkpoints", "model"
    }  # fmt: skip
    command = ["generate", "runs/sft", "What is 3 + 1?", "--max-new-tokens", "2"]
    assert app.exit_code(command) == 0


def test_the_kernels_that_explain_names_are_those_that_the_run_takes(project, capsys):
    assert app.exit_code(["kernels", "explain", "sft.yaml"]) == 0
    explained = sections(capsys.readouterr().out)["kernels"]
    assert app.exit_code(["run", "sft.yaml", "--dry-run"]) == 0
    assert sections(capsys.readouterr().out)["kernels"] == explained
    sites = {row.split()[0]: row.split()[1:4] for row in explained[1:]}
    assert sites["rms_norm"] == ["5", "of", "5"]
    assert sites["packed_attention"] == ["2", "of", "2"]
    assert sites["linear_cross_entropy"] == ["1", "of", "1"]


def test_a_kernel_that_cannot_serve_is_the_users_mistake(project, capsys):
    for command in (["kernels", "explain"], ["run"]):
        assert app.exit_code([*command, "sft.yaml", "kernels.rms_norm=triton"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("fasttrain: error: kernels.rms_norm: ") and error.count("\n") == 1
