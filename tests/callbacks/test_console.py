"""What a whole run prints, plain and redrawn."""

import io
import logging

import pytest
import torch
from fake_run import evaluation, log_record, make_run, result, step_end
from rich.console import Console as RichConsole

from fasttrain.callbacks import console as console_module
from fasttrain.callbacks.console import Console
from fasttrain.config.schema.callback import ConsoleConfig
from fasttrain.core.events import CheckpointRecord, Resumed
from fasttrain.core.kernel_plan import KernelPlan
from fasttrain.runtime import log
from fasttrain.runtime.log import Output


@pytest.fixture(autouse=True)
def fresh_output(monkeypatch):
    monkeypatch.setattr(log, "_output", None)
    monkeypatch.delenv("RANK", raising=False)
    yield
    log.LOGGER.handlers.clear()


@pytest.fixture
def terminal(monkeypatch):
    """What a colour terminal of 100 columns is sent."""
    rich = RichConsole(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(
        console_module, "configure", lambda **_: setattr(log, "_output", Output(rich))
    )
    return rich.file


def begin(run):
    console = Console(ConsoleConfig())
    console.on_run_start(run, None)
    console.on_data_ready(run, run.data.report)
    console.on_kernels_selected(run, KernelPlan())
    console.on_model_created(run, run.model)
    run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=1e-3)
    console.on_optimizer_created(run, run.optimizer)
    run.notes += [("engine", "local on CPU, 2 threads"), ("run", "a new run")]
    return console


def test_the_plain_screen_of_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("time.monotonic", iter(range(0, 10_000, 100)).__next__)
    run = make_run(tmp_path / "run")
    (run.directory / "model").mkdir(parents=True)
    (run.directory / "metrics.jsonl").touch()
    console = begin(run)
    console.on_train_start(run, None)
    run.step = run.steps_this_process = 120
    console.on_step_end(run, step_end(120))
    console.on_log(run, log_record(120))
    console.on_evaluation_end(run, evaluation(120, 1.6))
    saved = run.directory / "checkpoints" / "step-00000120"
    console.on_checkpoint_saved(run, CheckpointRecord(120, "sharded", saved, 0.4))
    run.best_eval_loss, run.best_step = 1.3, 3800
    run.tokens, run.supervised_tokens = 12_300_000, 5_900_000
    run.summary["unigram"] = "3.2 nat below"
    console.on_train_end(run, None)
    console.on_run_end(run, result(run.directory))
    shown = capsys.readouterr()
    assert shown.err == ""
    lines = shown.out.replace(str(run.directory), "runs/x").splitlines()
    assert lines[0] == "fasttrain · sft · runs/x"
    assert [line.split()[0] for line in lines[1:14] if not line.startswith(" ")] == [
        "data", "sample", "kernels", "model", "optimizer", "plan"
    ]  # fmt: skip
    assert lines[12:] == [
        "plan       engine  local on CPU, 2 threads",
        "           run     a new run",
        "step 120/4000 · loss 1.234 · gnorm 0.81 · lr 1.90e-05 · 41.2k tok/s (37.1k supervised) · "
        "peak 1.4 GiB · ETA 53m53s",
        "step 120 · held-out loss 1.600 (best so far) · 24.0k supervised tokens · 3.1s",
        "step 120 · saved runs/x/checkpoints/step-00000120 (sharded) · 0.4s",
        "done       step 4000 of 4000: all 4000 steps are done · 12.3M tokens (5.90M supervised) · "
        "3m20s",
        "loss       training 1.234 (last logged interval)",
        "           held out first 1.600 (step 120) → best 1.300 (step 3800) → last 1.400",
        "unigram    3.2 nat below",
        "files      runs/x/metrics.jsonl",
        'next       fasttrain generate runs/x "your prompt"',
    ]


def test_a_stopped_run_says_how_to_go_on(tmp_path, capsys):
    run = make_run(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    console = begin(run)
    console.on_train_start(run, None)
    console.on_run_end(
        run, result(tmp_path, step=7, finished=False, loss=None, eval_loss=None, reason="SIGTERM")
    )
    lines = capsys.readouterr().out.splitlines()
    assert "stopped    step 7 of 4000: SIGTERM" in lines[-3]
    assert lines[-1] == "next       the same command again goes on at step 8"


def test_a_dry_run_ends_with_the_plan(tmp_path, capsys):
    run = make_run(tmp_path, dry_run=True)
    console = begin(run)
    console.on_run_end(run, result(tmp_path, step=0, finished=False, reason="dry run: all built"))
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "plan       engine  local on CPU, 2 threads",
        "           run     a new run",
        "done       dry run: all built",
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_names_what_it_passed_over_after_the_plan(tmp_path, capsys):
    run = make_run(tmp_path)
    console = begin(run)
    resumed = Resumed(100, tmp_path / "step-00000100", ("step-00000200: its checksum is wrong",))
    console.on_resumed(run, resumed)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        "           run     a new run",
        "passed over step-00000200: its checksum is wrong",
        f"resumed at step 100 from {tmp_path / 'step-00000100'}",
    ]


def test_on_a_terminal_progress_is_one_line_that_is_redrawn(tmp_path, terminal):
    run = make_run(tmp_path)
    console = begin(run)
    console.on_train_start(run, None)
    sent = terminal.tell()
    for run.step in (10, 20):
        run.steps_this_process = run.step
        console.on_log(run, log_record(run.step))
    terminal.seek(sent)
    drawn = terminal.read()
    assert drawn.count("step 10/4000") == 1 and drawn.count("step 20/4000") == 1
    assert "\n" not in drawn, "a redraw must not scroll"
    assert drawn.index("step 10/4000") < drawn.index("\x1b[2K") < drawn.index("step 20/4000")
    assert drawn.count("\x1b[?25h") == 1, "the cursor stays visible"


def test_on_a_terminal_other_lines_go_above_the_redrawn_one(tmp_path, terminal):
    run = make_run(tmp_path)
    console = begin(run)
    console.on_train_start(run, None)
    console.on_log(run, log_record(10))
    sent = terminal.tell()
    console.on_evaluation_end(run, evaluation(10, 1.5))
    print("somebody else prints")
    logging.getLogger("fasttrain").addHandler(log._LineHandler())
    logging.getLogger("fasttrain").warning("careful")
    console.on_train_end(run, None)
    terminal.seek(sent)
    drawn = terminal.read()
    for line in ("held-out loss 1.500", "somebody else prints", "fasttrain: warning: careful"):
        above, _, below = drawn.partition(line)
        assert above.endswith(("\x1b[2K", "· ")) and "step 0/4000" in below, line
    assert drawn.endswith(("\r\x1b[2K", "\x1b[2K")), "the line is gone at the end"


def test_between_two_logged_steps_only_the_counter_moves(tmp_path, terminal, monkeypatch):
    run = make_run(tmp_path)
    console = begin(run)
    console.on_train_start(run, None)
    run.step = 10
    console.on_log(run, log_record(10))
    monkeypatch.setattr(console_module, "REDRAW_SECONDS", 0.0)
    run.step = 11
    console.on_step_end(run, step_end(11))
    assert "step 11/4000 · loss 1.234" in terminal.getvalue()
    console.on_error(run, RuntimeError())


def test_other_ranks_are_silent(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run = make_run(tmp_path)
    console = begin(run)
    console.on_log(run, log_record())
    logging.getLogger("fasttrain").warning("careful")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")


def test_the_first_held_out_loss_survives_a_restart():
    console = Console()
    console.on_evaluation_end(None, evaluation(0, 5.5))
    restarted = Console()
    restarted.load_state_dict(console.state_dict())
    assert restarted.seen.first_held_out == (0, 5.5)
