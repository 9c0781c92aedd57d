"""Which directory a run gets, whether it goes on there, and that nothing on disk is harmed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fasttrain.config.errors import UserError
from fasttrain.config.load import load
from fasttrain.core.checkpoint_interface import Found, ResumableCheckpoint
from fasttrain.core.metrics_file import cut_metrics
from fasttrain.core.run_directory import open_run_directory

ROOT = Path(__file__).parents[2]


class Steps(ResumableCheckpoint):
    """Directories named by their step, each with the id of its run."""

    def save(self, run):
        raise NotImplementedError

    def restore(self, run, path):
        raise NotImplementedError

    def find(self, directory, *, run_id=None):
        if (directory / "id").exists():
            return Found(directory)
        found = sorted((directory / "checkpoints").glob("step-*"), reverse=True)
        mine = [path for path in found if run_id in (None, (path / "id").read_text())]
        return Found(mine[0] if mine else None, ("step-9: is damaged",))


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {
        "model": {"type": "random"},
        "tokenizer": {"type": "trained"},
        "data": {"sources": ["python_stdlib"]},
        "max_steps": 10,
    }
    Path("sft.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def opened(*overrides, dry_run=False):
    return open_run_directory(load("sft.yaml", overrides), [Steps(None)], dry_run=dry_run)


def start(*overrides, finish=False, step=None, metrics=None):
    """One process: open, perhaps save a checkpoint, perhaps finish, and leave."""
    with opened(*overrides) as directory:
        if step is not None:
            checkpoint = directory.path / "checkpoints" / f"step-{step}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "id").write_text(directory.run_id)
            (checkpoint / "config.resolved.yaml").write_text(directory.resolved_config)
        if metrics is not None:
            (directory.path / "metrics.jsonl").write_text(metrics)
        if finish:
            directory.mark_finished()
    return directory


def everything(directory: Path) -> dict[str, bytes | None]:
    """Every path below and its bytes, but for the lock's."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
        if path.name != ".lock"
    }


def refusal(*overrides) -> str:
    """The one problem of a start that is refused and harms nothing."""
    before = everything(Path.cwd())
    with pytest.raises(UserError) as caught, opened(*overrides):
        pass
    assert everything(Path.cwd()) == before
    (problem,) = caught.value.problems
    return str(problem)


# --- output_dir and resume: auto ----------------------------------------------------------------


def test_a_first_run_gets_a_directory_by_the_config_name():
    directory = start()
    assert directory.path == Path("runs/sft")
    assert directory.message == "new, in runs/sft"
    assert directory.resume_from is None
    assert Path("runs/sft/config.resolved.yaml").read_text() == directory.resolved_config
    assert "max_steps: 10  # sft.yaml:" in directory.resolved_config
    assert load("runs/sft/config.resolved.yaml").config == load("sft.yaml").config


def test_an_unfinished_run_goes_on_from_its_newest_checkpoint():
    first = start(step=3)
    again = start()
    assert again.path == first.path and again.run_id == first.run_id
    assert again.resume_from == Path("runs/sft/checkpoints/step-3")
    assert again.message == "goes on in runs/sft, from step-3"
    assert again.skipped == ("step-9: is damaged",)


def test_an_unfinished_run_without_checkpoint_starts_over_and_keeps_what_it_logged():
    line = '{"step": 0, "eval_loss": 9.0}\n{"step": 10, "loss": 3.0}\n'
    first = start(metrics=line)
    again = start()
    assert again.run_id == first.run_id and again.resume_from is None
    assert again.message == (
        "starts over in runs/sft: no complete checkpoint is there yet (step-9: is damaged)"
    )
    assert Path("runs/sft/metrics.jsonl").read_text() == ""
    assert Path("runs/sft/metrics.jsonl.discarded").read_text() == line


def test_a_directory_of_another_config_is_refused_with_the_keys_that_differ():
    start(step=3)
    problem = refusal("optimizer.learning_rate=1e-3", "seed=7")
    assert "runs/sft: output_dir: an unfinished run of another config is there" in problem
    assert "optimizer.learning_rate: 2e-05 → 0.001" in problem and "seed: 42 → 7" in problem
    assert problem.endswith("start anew: fasttrain run sft.yaml resume=never")
    assert start("optimizer.learning_rate=1e-3", "resume=never").path == Path("runs/sft-2")


def test_a_run_that_never_began_to_train_may_be_started_with_another_config():
    start()
    assert start("seed=7").message.startswith("starts over in runs/sft")


def test_keys_that_do_not_change_training_are_free():
    start(step=3)
    assert start("logging.every_steps=1", "stop_after=2").resume_from is not None


def test_beside_a_finished_run_the_default_is_a_numbered_directory():
    start(finish=True)
    second = start(finish=True)
    assert second.message == "new, in runs/sft-2 (runs/sft holds a finished run)"
    third = start(step=1)
    assert third.path == Path("runs/sft-3")
    assert start().run_id == third.run_id


def test_a_finished_run_in_a_chosen_directory_is_refused_with_two_commands():
    start("output_dir=out", finish=True)
    problem = refusal("output_dir=out")
    assert "out: output_dir: it holds a finished run, which is not overwritten." in problem
    assert "fasttrain run sft.yaml output_dir=out-2 resume=never" in problem
    assert "fasttrain run sft.yaml output_dir=out-2 resume=out max_steps=N" in problem


# --- resume: never and a path -------------------------------------------------------------------


def test_never_starts_anew_beside_an_unfinished_run():
    first = start(step=3)
    second = start("resume=never")
    assert second.path == Path("runs/sft-2") and second.run_id != first.run_id
    assert second.resume_from is None


def test_never_is_refused_in_a_chosen_directory_that_holds_a_run():
    start("output_dir=out")
    assert "out: output_dir: it holds a run, which is not overwritten" in refusal(
        "output_dir=out", "resume=never"
    )


@pytest.mark.parametrize("source", ["runs/sft", "runs/sft/checkpoints/step-3"])
def test_a_path_is_gone_on_from_in_a_directory_of_its_own(source):
    first = start(step=3, finish=True)
    second = start(f"resume={source}", "max_steps=20")
    assert second.path == Path("runs/sft-2") and second.run_id != first.run_id
    assert second.resume_from == Path("runs/sft/checkpoints/step-3")
    assert second.message == (
        "new, in runs/sft-2 (runs/sft holds a finished run), from runs/sft/checkpoints/step-3, "
        "changed: max_steps: 10 → 20"
    )


def test_the_same_command_goes_on_with_the_run_that_it_took_over():
    start(step=3, finish=True)
    command = ("resume=runs/sft", "max_steps=20")
    second = start(*command)
    assert start(*command).resume_from == Path("runs/sft/checkpoints/step-3")
    start(*command, step=5)
    again = start(*command)
    assert again.run_id == second.run_id
    assert again.resume_from == Path("runs/sft-2/checkpoints/step-5")


def test_the_newest_checkpoint_of_an_unfinished_run_is_gone_on_from_in_place():
    first = start(step=3)
    again = start("resume=runs/sft/checkpoints/step-3")
    assert again.run_id == first.run_id and again.path == first.path


def test_an_older_checkpoint_is_not_gone_back_to_in_place():
    start("output_dir=out", step=3)
    start("output_dir=out", step=5)
    problem = refusal("output_dir=out", "resume=out/checkpoints/step-3")
    assert "out: output_dir: it holds another run" in problem
    assert start("resume=out/checkpoints/step-3").path == Path("runs/sft")


def test_a_path_without_a_checkpoint_is_refused_before_anything_is_made():
    assert "resume" in refusal("resume=runs/nowhere")
    start()
    assert "resume: runs/sft holds no complete checkpoint: step-9: is damaged." in refusal(
        "resume=runs/sft"
    )


def test_a_path_needs_a_checkpoint_that_can_be_resumed():
    start()
    loaded = load("sft.yaml", ["resume=runs/sft"])
    with (
        pytest.raises(UserError, match=r"checkpoint: \[\{type: sharded\}\]"),
        open_run_directory(loaded, []),
    ):
        pass


# --- what is not ours ---------------------------------------------------------------------------


def test_a_directory_with_other_files_is_refused():
    Path("data").mkdir()
    Path("data/train.jsonl").write_text("{}\n")
    problem = refusal("output_dir=data")
    assert "data: output_dir: it holds other files (train.jsonl) and no run" in problem


@pytest.mark.parametrize("place", ["sft.yaml", "/", "sft.yaml/below", "/proc/nowhere"])
def test_a_place_that_can_hold_no_run_is_refused(place):
    assert "output_dir" in refusal(f"output_dir={place}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_directory_without_permission_is_refused():
    Path("out").mkdir(mode=0o555)
    assert "out/run: output_dir: can't be used (Permission denied)" in refusal("output_dir=out/run")


NAMESPACES = subprocess.call(["unshare", "-Urm", "true"], stderr=subprocess.DEVNULL) == 0


@pytest.mark.skipif(not NAMESPACES, reason="needs mount namespaces")
def test_a_read_only_disk_is_refused():
    Path("out").mkdir()
    script = (
        "from dataclasses import replace\n"
        "from fasttrain.config.load import load\n"
        "from fasttrain.core.run_directory import open_run_directory\n"
        "loaded = load('sft.yaml')\n"
        "config = loaded.config.model_copy(update={'output_dir': 'out/run'})\n"
        "with open_run_directory(replace(loaded, config=config), []): pass\n"
    )
    mount = 'mount -t tmpfs -o ro tmpfs out && exec "$@"'
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", mount, "sh", sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"},
        capture_output=True,
        text=True,
    )
    assert "UserError: out/run: output_dir: can't be used (Read-only file system)" in done.stderr


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 1, "run": 1}', "\x00"])
def test_a_damaged_run_file_is_told(text):
    start()
    Path("runs/sft/run.json").write_text(text)
    assert "runs/sft/run.json: is damaged" in refusal()


def test_a_run_file_of_another_version_is_told():
    start()
    record = json.loads(Path("runs/sft/run.json").read_text())
    Path("runs/sft/run.json").write_text(json.dumps({**record, "format": 2}))
    assert "written by another version" in refusal()


def test_a_start_that_died_before_it_wrote_its_record_is_no_obstacle():
    Path("runs/sft").mkdir(parents=True)
    Path("runs/sft/.lock").write_text("process 1 on nowhere\n")
    Path("runs/sft/config.resolved.yaml").write_text("half")
    Path("runs/sft/.tmp-run.json-1-ab").write_text("{")
    assert start().message == "new, in runs/sft"
    assert not list(Path("runs/sft").glob(".tmp-*"))


# --- dry run ------------------------------------------------------------------------------------


def test_a_dry_run_decides_the_same_and_writes_nothing():
    start(step=3)
    before = everything(Path.cwd())
    with opened(dry_run=True) as directory:
        assert directory.resume_from == Path("runs/sft/checkpoints/step-3")
    with opened("output_dir=elsewhere", dry_run=True) as directory:
        assert directory.message == "new, in elsewhere"
    assert everything(Path.cwd()) == before


def test_a_dry_run_may_look_while_the_run_trains():
    with opened(), opened(dry_run=True) as directory:
        assert directory.path == Path("runs/sft")


# --- two processes ------------------------------------------------------------------------------

HOLDER = """
import os, sys, time
from fasttrain.config.load import load
from fasttrain.core.run_directory import open_run_directory
with open_run_directory(load("sft.yaml"), []) as directory:
    child = os.fork()          # a data worker that outlives its parent
    if child == 0:
        time.sleep(60)
        os._exit(0)
    print(os.getpid(), child, flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_gone():
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True, env=environment
    )
    pid, child = map(int, holder.stdout.readline().split())
    try:
        problem = refusal()
        assert f"runs/sft: output_dir: process {pid} on " in problem
        assert "is training in it" in problem
        os.kill(pid, signal.SIGKILL)
        holder.wait()
        assert start().message.startswith("starts over")
    finally:
        os.kill(child, signal.SIGKILL)
        holder.kill()


def test_the_lock_holds_inside_one_process_too():
    with opened():
        assert "is training in it" in refusal()
    start()


# --- metrics.jsonl ------------------------------------------------------------------------------


def lines(*steps):
    return "".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in steps)


def test_metrics_are_cut_back_to_the_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(0, 10, 20, 20, 30, 40))
    cut_metrics(path, 20)
    assert path.read_text() == lines(0, 10, 20, 20)
    cut_metrics(path, 10)
    assert path.read_text() == lines(0, 10)
    assert (tmp_path / "metrics.jsonl.discarded").read_text() == lines(30, 40, 20, 20)


@pytest.mark.parametrize(
    "torn", ['{"step": 5, "lo', '{"step": 5, "loss": 1.0}', "\x00\x00", "[]\n"]
)
def test_a_torn_line_is_set_aside(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(5) + torn)
    cut_metrics(path, 10)
    assert path.read_text() == lines(5)
    assert (tmp_path / "metrics.jsonl.discarded").read_text() == torn.rstrip("\n") + "\n"


def test_nothing_happens_where_nothing_is_to_be_cut(tmp_path):
    cut_metrics(tmp_path / "metrics.jsonl", 3)
    (tmp_path / "metrics.jsonl").write_text(lines(1, 2, 3))
    cut_metrics(tmp_path / "metrics.jsonl", 3)
    assert [path.name for path in tmp_path.iterdir()].count("metrics.jsonl.discarded") == 0
