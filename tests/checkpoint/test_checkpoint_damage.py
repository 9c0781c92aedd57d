"""Whatever happens to a checkpoint's bytes, it is passed over with the file and the reason."""

import hashlib
import json
import os
import shutil

import pytest

from fasttrain.checkpoint.manifest import IncompleteError, verify

FILES = [
    "manifest.json",
    "state.json",
    "config.resolved.yaml",
    "rank-0000/model.safetensors",
    "rank-0000/optimizer.safetensors",
    "rank-0000/rng.safetensors",
]


def truncate_to_nothing(file, _):
    os.truncate(file, 0)


def truncate_to_half(file, _):
    os.truncate(file, file.stat().st_size // 2)


def cut_the_last_byte(file, _):
    os.truncate(file, file.stat().st_size - 1)


def flip_a_bit(file, _):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def fill_with_zeros(file, _):
    file.write_bytes(bytes(file.stat().st_size))


def append_a_byte(file, _):
    with open(file, "ab") as appended:
        appended.write(b"\n")


def delete(file, _):
    file.unlink()


def take_it_from_another_step(file, same_file_of_another_step):
    shutil.copyfile(same_file_of_another_step, file)


def link_to_the_same_bytes(file, same_file_of_another_step):
    victim = same_file_of_another_step.with_name("victim")
    file.rename(victim)
    file.symlink_to(victim)


def put_a_directory(file, _):
    file.unlink()
    file.mkdir()


def put_a_pipe(file, _):
    file.unlink()
    os.mkfifo(file)


DAMAGES = [
    truncate_to_nothing,
    truncate_to_half,
    cut_the_last_byte,
    flip_a_bit,
    fill_with_zeros,
    append_a_byte,
    delete,
    take_it_from_another_step,
    link_to_the_same_bytes,
    put_a_directory,
    put_a_pipe,
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_every_damage_to_every_file_is_found(runs, sharded, name, damage):
    _, (first, second) = runs.saved([1, 2])
    spare = runs.directory / "spare"
    shutil.copytree(first, spare)
    if damage is take_it_from_another_step and name == "config.resolved.yaml":
        (spare / name).write_text("seed: 7\n")  # a run has one config; another's would differ
    damage(second / name, spare / name)
    found = sharded.find(runs.directory)
    assert found.path == first
    (line,) = found.skipped
    assert line.startswith(f"{second}: {name} ") or damage is take_it_from_another_step
    assert "\n" not in line


def test_a_surplus_file_is_found(runs, sharded):
    _, (first, second) = runs.saved([1, 2])
    (second / "rank-0000" / "scheduler.pt").write_bytes(b"\x80\x04.")
    found = sharded.find(runs.directory)
    assert found.path == first
    assert found.skipped == (f"{second}: rank-0000/scheduler.pt is not in the manifest",)


def test_a_surplus_link_to_a_directory_is_found(runs, sharded):
    _, (first, second) = runs.saved([1, 2])
    (second / "rank-0001").symlink_to(first / "rank-0000")
    assert sharded.find(runs.directory).path == first


def test_a_missing_rank_is_found(runs, sharded):
    _, (first, second) = runs.saved([1, 2])
    shutil.rmtree(second / "rank-0000")
    assert sharded.find(runs.directory).path == first


def test_a_checkpoint_that_is_a_link_is_passed_over(runs, sharded):
    _, (first, second) = runs.saved([1, 2])
    second.rename(runs.directory / "elsewhere")
    second.symlink_to(runs.directory / "elsewhere")
    found = sharded.find(runs.directory)
    assert found.path == first and found.skipped == (f"{second}: is a symbolic link",)


def test_a_manifest_of_another_format_is_passed_over(runs, sharded, monkeypatch):
    _, (first,) = runs.saved([1])
    monkeypatch.setattr("fasttrain.checkpoint.manifest.FORMAT", 2)
    found = sharded.find(runs.directory)
    assert found.path is None
    assert found.skipped == (f"{first}: manifest.json has format 1, this version reads 2",)


@pytest.mark.parametrize("file", ["manifest.json", "state.json", "rank-0000/model.safetensors"])
def test_every_bit_counts(runs, file):
    _, (path,) = runs.saved([1])
    data = (path / file).read_bytes()
    for place in range(0, len(data), 37):
        for bit in (0, 3, 6):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            (path / file).write_bytes(damaged)
            with pytest.raises(IncompleteError, match=file):
                verify(path)
    (path / file).write_bytes(data)
    assert verify(path).step == 1


def test_when_all_are_damaged_all_are_named(runs, sharded):
    _, paths = runs.saved([1, 2])
    for path in paths:
        (path / "state.json").unlink()
    found = sharded.find(runs.directory)
    assert found.path is None
    assert found.skipped == tuple(f"{path}: state.json is missing" for path in paths[::-1])


def test_a_hostile_manifest_makes_nothing_outside_be_read(runs, sharded):
    _, (path,) = runs.saved([1])
    fields = json.loads((path / "manifest.json").read_text())
    del fields["sha256"]
    fields["files"]["../../../outside"] = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    body = json.dumps(fields, indent=1, sort_keys=True)
    fields["sha256"] = hashlib.sha256(body.encode()).hexdigest()
    text = json.dumps(fields, indent=1, sort_keys=True) + "\n"
    (path / "manifest.json").write_text(text)
    (runs.directory.parent / "outside").write_bytes(b"")
    found = sharded.find(runs.directory)
    assert found.path is None and "../../../outside is missing" in found.skipped[0]
