"""The command line as it is typed: help, versions, errors, exit codes."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

import fasttrain
from fasttrain.cli import app, run
from fasttrain.config.errors import Problem, UserError

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "datasets", "tokenizers", "pydantic_core", "numpy", "matplotlib")


def fasttrain_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        cwd=ROOT,
    )


def verb(monkeypatch, action):
    """Makes `fasttrain run FILE` do `action`."""
    monkeypatch.setattr(run, "run", lambda file, overrides, **options: action())


def test_help_names_every_verb_and_loads_nothing_heavy():
    code = (
        "import sys\nfrom fasttrain.cli.app import exit_code\ncode = exit_code(['--help'])\n"
        f"print('HEAVY', sorted(set({HEAVY}) & set(sys.modules)), code)"
    )
    ended = fasttrain_process("-c", code)
    assert ended.stdout.endswith("HEAVY [] 0\n"), ended
    for name in ("run", "generate", "validate", "show-config", "schema", "kernels"):
        assert f" {name} " in ended.stdout


def test_the_version(capsys):
    assert app.exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"fasttrain {fasttrain.__version__}\n"


def test_it_is_a_module_too():
    ended = fasttrain_process("-m", "fasttrain", "--version")
    assert (ended.returncode, ended.stdout) == (0, f"fasttrain {fasttrain.__version__}\n")


def test_without_a_verb_the_help_is_shown(capsys):
    assert app.exit_code([]) == 2
    shown = capsys.readouterr()
    assert "Usage" in shown.out and shown.err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "Missing argument 'FILE'"),
        (["run", "x.yaml", "--nprocs", "2"], "No such option: --nprocs"),
        (["train", "x.yaml"], "No such command 'train'"),
        (["run", "x.yaml", "--nproc", "0"], "Invalid value for '--nproc': "),
    ],
)
def test_a_misspelt_command_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert app.exit_code(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fasttrain: error: {message}") and error.count("\n") == 1


def test_each_problem_is_one_line_in_order_and_nothing_follows(monkeypatch, capsys):
    def fail():
        raise UserError(
            Problem("unknown key.", where="a.yaml:3", key="optimzer", hint="Did you mean this?"),
            Problem("two\nlines"),
        )

    verb(monkeypatch, fail)
    assert app.exit_code(["run", "a.yaml"]) == 2
    assert capsys.readouterr().err == (
        "fasttrain: error: a.yaml:3: optimzer: unknown key. Did you mean this?\n"
        "fasttrain: error: two\\nlines\n"
    )


def test_our_mistake_is_one_line_and_exit_code_1(monkeypatch, capsys):
    def fail():
        raise RuntimeError("shapes\n(3,) and (4,)")

    verb(monkeypatch, fail)
    assert app.exit_code(["run", "a.yaml"]) == 1
    assert capsys.readouterr().err == (
        "fasttrain: internal error: RuntimeError: shapes (3,) and (4,) "
        "(--debug shows the traceback)\n"
    )


@pytest.mark.parametrize(
    ("error", "code"), [(RuntimeError("broken"), 1), (UserError("mistaken"), 2)]
)
def test_debug_shows_the_traceback_before_the_line(monkeypatch, capsys, error, code):
    def fail():
        raise error

    verb(monkeypatch, fail)
    with pytest.raises(SystemExit) as exit:
        app.main(["run", "a.yaml", "--debug"])
    assert exit.value.code == code
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("fasttrain: ") and str(error) in lines[-1]


def test_other_ranks_repeat_no_error(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")

    def fail():
        raise UserError("mistaken")

    verb(monkeypatch, fail)
    assert app.exit_code(["run", "a.yaml"]) == 2
    assert capsys.readouterr().err == ""


def test_an_interrupt_before_the_loop_leaves_quietly_with_130(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    verb(monkeypatch, interrupt)
    assert app.exit_code(["run", "a.yaml"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("code", [0, 3, 143])
def test_the_runs_exit_code_is_the_commands(monkeypatch, code):
    verb(monkeypatch, lambda: code)
    with pytest.raises(SystemExit) as exit:
        app.main(["run", "a.yaml"])
    assert exit.value.code == code


def test_options_and_overrides_may_be_mixed(monkeypatch):
    seen = []
    monkeypatch.setattr(run, "run", lambda *args, **options: seen.append((args, options)) or 0)
    app.exit_code(["run", "a.yaml", "max_steps=3", "--dry-run", "optimizer.eps=1e-8", "seed=-1"])
    [(arguments, options)] = seen
    assert arguments == ("a.yaml", ["max_steps=3", "optimizer.eps=1e-8", "seed=-1"])
    assert options == {"dry_run": True, "nproc": 1}


def test_several_processes_are_refused_with_what_to_do(capsys):
    assert app.exit_code(["run", "absent.yaml", "--nproc", "2"]) == 2
    assert capsys.readouterr().err == (
        "fasttrain: error: command line: --nproc: 2 processes need the distributed engine, "
        "which is not there yet. Leave --nproc out; CUDA_VISIBLE_DEVICES=0 chooses one of several "
        "GPUs.\n"
    )


def test_a_faulty_config_is_told_before_torch_is_loaded(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("modle: x\n")
    code = (
        "import sys\nfrom fasttrain.cli.app import exit_code\n"
        f"code = exit_code(['run', {str(config)!r}])\nprint(code, 'torch' in sys.modules)"
    )
    ended = fasttrain_process("-c", code)
    assert ended.stdout == "2 False\n", ended
    assert all(line.startswith("fasttrain: error: ") for line in ended.stderr.splitlines())
    assert f"{config}:1: modle: " in ended.stderr


def test_a_reader_that_leaves_ends_the_command_quietly(tmp_path):
    script = f"{sys.executable} -m fasttrain schema | head -c 1; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ended.stderr == ""


def test_third_parties_are_quieted_in_our_process_and_the_users_settings_stand(monkeypatch):
    from fasttrain.cli import quiet

    monkeypatch.setattr(os, "environ", {"TRANSFORMERS_VERBOSITY": "info"})
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: True))
    with warnings.catch_warnings(record=True) as shown:
        quiet.quiet_third_parties()
        for module in ("transformers.modeling_utils", "torch.nn", "fasttrain.data"):
            warnings.warn_explicit("old", FutureWarning, "file.py", 1, module=module)
            warnings.warn_explicit("look", UserWarning, "file.py", 2, module=module)
    assert [str(warning.message) for warning in shown] == ["look", "old", "look"], "torch, ours"
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
    assert os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "1"
    assert "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ, "a download shows on a terminal"
