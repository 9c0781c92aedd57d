"""`fasttrain kernels list`, `check`, `bench` and `reset`; `explain` is in test_app.py."""

import json

import pytest
import torch
import yaml
from fasttrain_kernels import choose, native, timing
from fasttrain_kernels.ops.swiglu import cpu_kernel
from fasttrain_kernels.registry import OPS
from tiny import CONFIG

from fasttrain.cli import app
from fasttrain.cli.kernels import kernel_rows
from fasttrain.runtime import log


@pytest.fixture(autouse=True)
def fresh_output(monkeypatch):
    monkeypatch.setattr(log, "_output", None)
    monkeypatch.delenv("FASTTRAIN_KERNELS", raising=False)


needs_cpu_kernel = pytest.mark.skipif(
    native.why_not("_C_cpu") is not None, reason=f"{native.why_not('_C_cpu')}"
)


def test_every_backend_of_every_op_is_a_row_with_a_reason_where_it_cannot_serve():
    rows = kernel_rows(torch.device("cpu"), torch.float32)
    assert [row[:2] for row in rows] == [
        (name, candidate.name) for name, op in sorted(OPS.items()) for candidate in op.candidates
    ]
    assert all(why for _, _, usable, why in rows if usable == "no")
    chosen = [op for op, _, usable, why in rows if why == "chosen by auto" and usable == "yes"]
    assert chosen == sorted(OPS)
    assert ("rms_norm", "triton", "no", "made for cuda") in rows


def test_the_table_is_printed(capsys):
    assert app.exit_code(["kernels", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("in order of preference:")
    assert lines[1].split() == ["op", "backend", "usable", "why"]
    assert any(line.split()[:3] == ["rms_norm", "eager", "yes"] for line in lines)


@pytest.mark.parametrize("asked", ["rms_norm=magic", "rms_morn=cpu", "mode"])
def test_a_faulty_environment_variable_is_the_users_mistake(asked, monkeypatch, capsys):
    monkeypatch.setenv("FASTTRAIN_KERNELS", asked)
    assert app.exit_code(["kernels", "list"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fasttrain: error: environment: ") and error.count("\n") == 1


@needs_cpu_kernel
def test_check_prints_every_self_test_and_one_that_fails_is_not_used_any_more(
    capsys, monkeypatch, own_cache
):
    assert app.exit_code(["kernels", "check", "swiglu"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines[0][:3] == ["op", "backend", "self-test"]
    assert ["swiglu", "cpu", "passed"] in [line[:3] for line in lines]
    assert ["swiglu", "compile", "not", "run"] in [line[:4] for line in lines]
    module = cpu_kernel
    monkeypatch.setattr(module, "forward", lambda gate, up, activation, y: y.zero_())
    assert app.exit_code(["kernels", "check", "swiglu=cpu"]) == 1
    assert "failed" in capsys.readouterr().out
    assert choose("swiglu", device="cpu", dtype=torch.float32).backend == "eager"
    monkeypatch.undo()
    monkeypatch.setenv("FASTTRAIN_CACHE", str(own_cache))
    assert app.exit_code(["kernels", "reset", "swiglu=cpu"]) == 0
    assert "swiglu=cpu is forgotten" in capsys.readouterr().out
    assert choose("swiglu", device="cpu", dtype=torch.float32).backend == "cpu"


@pytest.mark.parametrize("verb", ["check", "reset"])
@pytest.mark.parametrize("asked", ["swigloo", "swiglu=magic"])
def test_a_name_that_is_none_is_the_users_mistake(verb, asked, capsys, own_cache):
    assert app.exit_code(["kernels", verb, asked]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fasttrain: error: ") and error.count("\n") == 1


@needs_cpu_kernel
def test_bench_times_the_configs_sizes_and_runs_go_by_it(tmp_path, monkeypatch, capsys, own_cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timing, "SECONDS", 0.01)
    chat = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "yes it is"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 30)
    config = CONFIG | {"kernels": {"providers": "none"}}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(config))
    assert app.exit_code(["kernels", "bench", "sft.yaml"]) == 0
    table = capsys.readouterr().out
    assert "ms (eager)" in table and "that were timed" in table
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == [
        "chats.jsonl",
        "kernel-cache",
        "sft.yaml",
    ]
    assert app.exit_code(["run", "sft.yaml", "--dry-run"]) == 0
    again = capsys.readouterr().out
    rows = [line.split(maxsplit=1)[-1] for line in table.splitlines() if "were timed" in line]
    assert rows and all(row.strip() in again for row in rows)


def test_explain_lists_sites_by_their_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").write_text('{"text": "once upon a time"}\n')
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(CONFIG))
    assert app.exit_code(["kernels", "explain", "sft.yaml", "--sites"]) == 0
    out = capsys.readouterr().out
    assert "causal_lm.model.layers.0.mlp" in out and "evaluation: the same kernels" in out
