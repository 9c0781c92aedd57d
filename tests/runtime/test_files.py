"""Files are whole or absent, and links are not followed."""

import os

import pytest

from fasttrain.runtime.files import (
    opened,
    remove_temporaries,
    replace_directory,
    sha256_of,
    write_atomically,
    write_new,
)


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "run.json"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and names_in(tmp_path) == ["run.json"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "run.json"
    write_atomically(path, b"old")

    def failing(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and names_in(tmp_path) == ["run.json"]


def test_a_link_is_replaced_not_followed(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "run.json"
    victim.write_bytes(b"mine")
    path.symlink_to(victim)
    write_atomically(path, b"new")
    assert victim.read_bytes() == b"mine" and path.read_bytes() == b"new"
    assert not path.is_symlink()


@pytest.mark.parametrize("make", ["file", "link", "dangling link"])
def test_a_new_file_takes_no_name_that_is_there(tmp_path, make):
    path, victim = tmp_path / "new", tmp_path / "victim"
    if make != "dangling link":
        victim.write_bytes(b"mine")
    path.write_bytes(b"mine") if make == "file" else path.symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_new(path, b"theirs")
    assert make == "dangling link" or victim.read_bytes() == b"mine"
    assert make != "dangling link" or not victim.exists()


@pytest.mark.parametrize("make", ["link", "pipe", "directory"])
def test_only_files_are_read(tmp_path, make):
    path = tmp_path / "odd"
    if make == "link":
        (tmp_path / "victim").write_bytes(b"secret")
        path.symlink_to(tmp_path / "victim")
    elif make == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(OSError), opened(path):
        pass


def test_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_a_directory_is_replaced_whole(tmp_path):
    target = tmp_path / "model"
    replace_directory(target, lambda path: (path / "a").write_text("1"))
    replace_directory(target, lambda path: (path / "b").write_text("2"))
    assert names_in(tmp_path) == ["model"] and names_in(target) == ["b"]


@pytest.mark.parametrize("failing_rename", [1, 2, 3])
def test_a_directory_is_never_lost(tmp_path, monkeypatch, failing_rename):
    target, genuine, count = tmp_path / "model", os.rename, 0
    replace_directory(target, lambda path: (path / "a").write_text("1"))

    def rename(*args):
        nonlocal count
        count += 1
        if count == failing_rename:
            raise OSError(5, "Input/output error")
        genuine(*args)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", rename)
        with pytest.raises(OSError, match="Input/output"):
            replace_directory(target, lambda path: (path / "b").write_text("2"))
    # The third rename takes the old one away; the new one stands by then.
    assert names_in(target) == (["b"] if failing_rename == 3 else ["a"])
    replace_directory(target, lambda path: (path / "c").write_text("3"))
    assert names_in(tmp_path) == ["model"] and names_in(target) == ["c"]


def test_what_a_crash_left_between_the_renames_is_kept_until_there_is_another(tmp_path):
    old = tmp_path / "model.replaced"
    old.mkdir()
    with pytest.raises(ZeroDivisionError):
        replace_directory(tmp_path / "model", lambda path: 1 / 0)
    assert names_in(tmp_path) == ["model"]
    replace_directory(tmp_path / "model", lambda path: (path / "b").write_text("2"))
    assert names_in(tmp_path) == ["model"] and names_in(tmp_path / "model") == ["b"]


def test_temporaries_are_removed_and_nothing_else(tmp_path):
    (tmp_path / ".tmp-step-1").mkdir()
    (tmp_path / ".tmp-step-1" / "file").write_text("half")
    (tmp_path / ".tmp-run.json").write_text("half")
    (tmp_path / "kept").write_text("whole")
    remove_temporaries(tmp_path)
    assert names_in(tmp_path) == ["kept"]
