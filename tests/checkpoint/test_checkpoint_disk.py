"""A disk that refuses leaves the former checkpoints whole and nothing half-written."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fasttrain.checkpoint import sharded as sharded_module
from fasttrain.checkpoint.manifest import verify

ROOT = Path(__file__).parents[2]
NAMESPACES = subprocess.call(["unshare", "-Urm", "true"], stderr=subprocess.DEVNULL) == 0


def visible(directory):
    return sorted(path.name for path in directory.iterdir())


def refused(runs, sharded, run, error):
    """A save that fails with `error` and changes nothing."""
    (former,) = (runs.directory / "checkpoints").iterdir()
    with pytest.raises(OSError) as caught:
        sharded.save(run)
    assert caught.value.errno == error
    assert visible(former.parent) == [former.name]
    assert sharded.find(runs.directory).path == former


@pytest.mark.parametrize("limit", [1, 400, 2000])
def test_a_file_size_limit(runs, sharded, limit):
    run, _ = runs.saved([1])
    runs.train(run)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    try:
        refused(runs, sharded, run, errno.EFBIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        signal.signal(signal.SIGXFSZ, former)
    assert sharded.save(run).name == "step-00000002"


CALLS = ["open", "fsync", "rename", "mkdir"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("call", CALLS)
def test_every_call_may_fail(runs, sharded, monkeypatch, call, error):
    """The n-th `call` of a save fails, for each n, until a save needs fewer."""
    run, (former,) = runs.saved([1])
    runs.train(run)
    genuine = getattr(os, call)
    for number in range(1, 40):
        calls = 0

        def failing(*args, number=number, **kwargs):
            nonlocal calls
            calls += 1
            if calls == number:
                raise OSError(error, os.strerror(error))
            return genuine(*args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(os, call, failing)
            try:
                saved = sharded.save(run)
                break
            except OSError as refusal:
                # What can't be read back may as well not have been written: EIO.
                assert refusal.errno in (error, errno.EIO)
        complete = sharded.find(runs.directory)
        # After the rename the new one stands already; before it the former does, alone.
        assert complete.path in (former, former.with_name("step-00000002"))
        assert complete.skipped == ()
        assert former.exists()
        assert not list(former.parent.glob(".tmp-*"))
        shutil.rmtree(former.with_name("step-00000002"), ignore_errors=True)
    assert number > 1 or call == "mkdir"
    assert saved.name == "step-00000002" and verify(saved).step == 2


def test_bytes_that_read_back_otherwise_are_never_a_checkpoint(runs, sharded, monkeypatch):
    run, _ = runs.saved([1])
    runs.train(run)
    genuine = sharded_module.write_slices

    def corrupting(path, slices):
        file_sum = genuine(path, slices)
        with open(path, "r+b") as file:
            file.seek(100)
            file.write(b"\xff\xff")
        return file_sum

    monkeypatch.setattr(sharded_module, "write_slices", corrupting)
    refused(runs, sharded, run, errno.EIO)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_directory_without_permission(runs, sharded):
    run, (former,) = runs.saved([1])
    runs.train(run)
    former.parent.chmod(0o555)
    try:
        refused(runs, sharded, run, errno.EACCES)
    finally:
        former.parent.chmod(0o755)


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_fail_the_save(
    runs, sharded, monkeypatch, caplog
):
    run, _ = runs.saved([1, 2], keep=2)
    runs.train(run)

    def refusing(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(sharded_module, "remove_directory", refusing)
    assert sharded.save(run).name == "step-00000003"
    assert "step-00000001 could not be deleted" in caplog.text


# --- planted links ------------------------------------------------------------------------------


def test_a_link_at_the_step_is_not_written_through(runs, sharded, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("mine")
    run, (former,) = runs.saved([1])
    runs.train(run)
    (former.parent / "step-00000002").symlink_to(victim)
    with pytest.raises(FileExistsError, match="is a symbolic link"):
        sharded.save(run)
    assert visible(victim) == ["precious"]
    assert not list(former.parent.glob(".tmp-*"))


def test_a_link_at_the_directory_of_checkpoints_is_not_followed(runs, sharded, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / "checkpoints").symlink_to(victim)
    with pytest.raises(FileExistsError, match="checkpoints is a symbolic link"):
        sharded.save(runs.train(runs()))
    assert visible(victim) == []


def test_links_among_stale_temporaries_are_removed_not_followed(runs, sharded, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("mine")
    run, (former,) = runs.saved([1])
    (former.parent / ".tmp-step-00000002-1-ab").symlink_to(victim)
    runs.train(run)
    sharded.save(run)
    assert visible(former.parent) == ["step-00000001", "step-00000002"]
    assert visible(victim) == ["precious"]


# --- a disk that is full ------------------------------------------------------------------------

FULL_DISK = """
import errno, os, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from conftest import RunMaker, ShardedCheckpoint, ShardedCheckpointConfig
disk = Path(sys.argv[1])
runs, sharded = RunMaker(disk), ShardedCheckpoint(ShardedCheckpointConfig())
run, (former,) = runs.saved([1])
runs.train(run)
free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
for left in range(0, 40000, 4096):
    (disk / "ballast").write_bytes(bytes(max(free - left, 0)))
    try:
        saved = sharded.save(run)
        break
    except OSError as error:
        assert error.errno == errno.ENOSPC, error
    assert [path.name for path in former.parent.iterdir()] == [former.name]
    assert sharded.find(disk).path == former
    (disk / "ballast").unlink()
assert sharded.find(disk).path == saved != former
print("refused until", left, "bytes were free")
"""


@pytest.mark.skipif(not NAMESPACES, reason="needs mount namespaces")
def test_a_full_disk(tmp_path):
    mount = 'mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"'
    paths = [str(Path(__file__).parent), str(ROOT / "tests"), str(ROOT), str(ROOT / "kernels")]
    script = [sys.executable, "-c", FULL_DISK, str(tmp_path), *paths]
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", mount, str(tmp_path), *script],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused until") and "until 0 bytes" not in done.stdout
