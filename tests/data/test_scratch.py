"""The directory for rows goes with its process; a killed process's goes with the next one."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fasttrain.data import scratch

MAKE = """
    from fasttrain.data.scratch import scratch_directory
    directory = scratch_directory()
    (directory / "rows.arrow").write_bytes(b"rows")
    print(directory, flush=True)
"""


def start(tmp_path, code):
    """A Python process whose TMPDIR is `tmp_path`, and the directory it made."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(MAKE) + textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    return process, Path(process.stdout.readline().strip())


def end(process):
    process.communicate()
    return process.returncode


def test_it_goes_when_the_process_ends(tmp_path):
    for code in ("", "raise SystemExit(3)"):
        process, directory = start(tmp_path, code)
        assert directory.parent == tmp_path
        end(process)
        assert list(tmp_path.iterdir()) == []


def test_a_forked_child_that_ends_leaves_it_to_its_parent(tmp_path):
    code = """
        import os, sys
        child = os.fork()
        if child == 0:
            sys.exit()
        os.waitpid(child, 0)
        assert (directory / "rows.arrow").exists()
    """
    process, _ = start(tmp_path, code)
    assert end(process) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_is_cleaned_up_after_and_a_living_one_is_not(tmp_path):
    living, used = start(tmp_path, "input()")
    killed, abandoned = start(tmp_path, "input()")
    killed.send_signal(signal.SIGKILL)
    assert end(killed) == -signal.SIGKILL
    assert (abandoned / "rows.arrow").exists()
    third, _ = start(tmp_path, "")
    assert end(third) == 0
    assert list(tmp_path.iterdir()) == [used] and (used / "rows.arrow").exists()
    living.communicate("\n")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_ours_stays(tmp_path, monkeypatch):
    """A directory without our lock, and one of another user."""
    unlocked = tmp_path / f"{scratch.PREFIX}unlocked"
    foreign = tmp_path / f"{scratch.PREFIX}foreign"
    for directory in (unlocked, foreign):
        directory.mkdir()
    (foreign / "lock").touch()
    monkeypatch.setattr(scratch.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(scratch.os, "getuid", lambda: os.stat(foreign).st_uid + 1)
    scratch._remove_abandoned()
    assert foreign.exists() and unlocked.exists()
    monkeypatch.undo()
    monkeypatch.setattr(scratch.tempfile, "gettempdir", lambda: str(tmp_path))
    scratch._remove_abandoned()
    assert unlocked.exists() and not foreign.exists()


@pytest.fixture(autouse=True)
def _no_parent_directory(monkeypatch):
    """Children make their own."""
    monkeypatch.delenv("TMPDIR", raising=False)
