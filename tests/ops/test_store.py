"""What is kept of kernels from process to process: whole, shared, and never in the way."""

import errno
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import fasttrain_kernels
import pytest
import torch
from fasttrain_kernels import fingerprint, store, timing
from fasttrain_kernels.store import SECTIONS, Store, reset, store_for
from toy_op.op import describe, make

FACTS = {"device": "A device (R)", "torch": "1"}


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def path(own_cache):
    return own_cache / "kernels" / "records.json"


def test_records_survive_the_process_and_say_where_they_are_from(path):
    Store(path, FACTS).put("parity", "toy|good|float32", 0.5)
    assert Store(path, FACTS).get("parity", "toy|good|float32") == 0.5
    assert json.loads(path.read_text())["environment"] == FACTS
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".json", ".lock"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"[]", b"null", b'{"parity": 3}', b'{"parity": {}, "times": []}'],
)
def test_a_file_that_is_none_is_begun_anew(path, content, caplog):
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    kept = Store(path, FACTS)
    assert kept.get("parity", "toy|good") is None
    kept.put("parity", "toy|good", 1.0)
    assert Store(path, FACTS).get("parity", "toy|good") == 1.0
    assert caplog.text.count("can't be read") == 1
    assert make("good").choose(describe()).backend == "good"


@pytest.mark.parametrize(
    ("section", "record"),
    [
        *(("parity", value) for value in (float("nan"), -1, "x", None, [])),
        *(("quarantine", value) for value in (3, {}, None, "it is wrong")),
        *(("times", value) for value in (3, {}, {"backends": 3}, {"backends": {"good": 3}})),
        *(("times", {"backends": {"good": found}}) for found in ({}, {"ms": "x"}, {"ms": -1.0})),
    ],
)
def test_a_record_that_is_none_is_begun_anew(section, record, caplog):
    keys = {"parity": "toy|good|torch.float32", "quarantine": "toy|good"}
    path, problem = store_for("cpu").path, describe(rows=1000)
    keys["times"] = timing._key(make("good"), problem)
    path.parent.mkdir(parents=True)
    path.write_text(
        json.dumps({name: {} for name in SECTIONS} | {section: {keys[section]: record}})
    )
    store._stores.clear()
    row = make("good").choose(problem)
    assert (row.backend, row.parity, row.milliseconds) == ("good", 0.0, None)
    assert caplog.text.count("can't be read") == 1


def test_where_nothing_can_be_written_the_process_keeps_it_to_itself(path, caplog):
    path.parent.parent.mkdir()
    path.parent.write_text("a file in the folder's place")  # as root, no mode keeps us out
    kept = Store(path, FACTS)
    for value in (0.5, 0.7):
        kept.put("parity", "toy|good", value)
    with kept.in_flight("toy", "good", "self-test"), kept.measuring():
        kept.quarantine("toy", "wrong", "it is wrong")
    assert kept.get("parity", "toy|good") == 0.7
    assert kept.quarantined("toy", "wrong") == "it is wrong"
    assert caplog.text.count("can't be written") == 1
    assert "set FASTTRAIN_CACHE to a folder that can be" in caplog.text
    op = make("wrong", "good")
    assert op.choose(describe()).backend == "good"


def test_a_folder_in_the_place_of_the_file_is_never_fatal(path, caplog):
    path.mkdir(parents=True)
    kept = Store(path, FACTS)
    kept.put("parity", "toy|good", 0.5)
    assert kept.get("parity", "toy|good") == 0.5
    assert "can't be" in caplog.text
    assert list(path.parent.glob("*.tmp")) == []


WRITES = """
import sys
from pathlib import Path
from fasttrain_kernels.store import Store
kept = Store(Path(sys.argv[1]), {"device": "d"})
for number in range(40):
    kept.put("launched", f"{sys.argv[2]}|{number}", "now")
"""


def test_many_processes_lose_nothing(path):
    command = [sys.executable, "-c", WRITES, str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    both = [subprocess.Popen([*command, name], env=environment) for name in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    records = json.loads(path.read_text())
    assert set(records["launched"]) == {f"{name}|{n}" for name in "ab" for n in range(40)}
    assert list(path.parent.glob("*.tmp")) == []


def test_forgetting_takes_what_it_names_and_no_more(path):
    kept = Store(path, FACTS)
    for op in ("toy", "toys"):
        for backend in ("good", "goods"):
            kept.put("parity", f"{op}|{backend}|float32", 0.5)
            kept.quarantine(op, backend, "why not")
        kept.put("times", f"{op}|rows=8", {"backends": {}})
    kept.forget("toy", "good")
    left = {section: set(Store(path, FACTS)._records[section]) for section in SECTIONS}
    assert left["parity"] == {"toy|goods|float32", "toys|good|float32", "toys|goods|float32"}
    assert left["quarantine"] == {"toy|goods", "toys|good", "toys|goods"}
    assert left["times"] == {"toys|rows=8"}
    reset("toys")
    left = {section: set(Store(path, FACTS)._records[section]) for section in SECTIONS}
    assert left["parity"] == {"toy|goods|float32"} and left["times"] == set()
    assert json.loads(path.read_text())["environment"] == FACTS
    reset()
    assert not path.exists()


def test_a_crash_is_told_once_and_reset_forgets_it(path):
    kept = Store(path, FACTS)
    flight = kept._flights / "1-dead.json"
    flight.parent.mkdir(parents=True)
    flight.write_text('{"op": "toy", "backend": "good", "what": "self-test", "process": 7}')
    (kept._flights / "2-half.json").write_text('{"op": "to')
    assert Store(path, FACTS).quarantined("toy", "good") == "process 7 ended during its self-test"
    assert list(kept._flights.iterdir()) == []
    flight.write_text('{"op": "toy", "backend": "good", "what": "self-test", "process": 7}')
    reset()
    assert Store(path, FACTS).quarantined("toy", "good") is None


def test_another_torch_or_source_or_device_is_another_file(monkeypatch):
    first = store_for("cpu").path
    assert store_for("cpu") is store_for("cpu")
    for name, value in (("source_digest", "f" * 16), ("device_name", "Another CPU")):
        with monkeypatch.context() as patch:
            patch.setattr(fingerprint, name, lambda *_, value=value: value)
            fingerprint.fingerprint.cache_clear()
            assert store_for("cpu").path != first
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        fingerprint.fingerprint.cache_clear()
        assert store_for("cpu").path != first
    fingerprint.fingerprint.cache_clear()
    assert store_for("cpu").path == first


def test_the_digest_is_of_every_source_file(monkeypatch, tmp_path):
    (tmp_path / "ops").mkdir()
    source, library = tmp_path / "ops" / "kernel.py", tmp_path / "_C_cpu.so"
    monkeypatch.setattr(fingerprint, "PACKAGE", tmp_path)
    digests = set()
    for change in (lambda: source.write_text("a"), lambda: source.write_text("b"), library.touch):
        change()
        fingerprint.source_digest.cache_clear()
        digests.add(fingerprint.source_digest())
    fingerprint.source_digest.cache_clear()
    assert len(digests) == 3


@pytest.mark.parametrize("variable", ["", "~nobody-of-this-name/cache"])
def test_where_nobody_is_at_home_the_process_keeps_it_to_itself(variable, monkeypatch, caplog):
    def nameless(number):
        raise KeyError(number)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nameless)
    monkeypatch.setenv("FASTTRAIN_CACHE", variable)
    row = make("wrong", "good").choose(describe())
    assert row.backend == "good" and "its self-test is off" in row.rejected[0].reason
    assert "set FASTTRAIN_CACHE to a folder that can be" in caplog.text
    assert reset() == []


def test_a_disk_that_fills_up_or_goes_away_is_never_fatal(path, monkeypatch, caplog):
    kept = Store(path, FACTS)

    def gone(*arguments, **options):
        raise OSError(errno.ESTALE, "Stale file handle")

    with kept.in_flight("toy", "good", "self-test"):
        monkeypatch.setattr(Path, "write_text", gone)
        monkeypatch.setattr(Path, "unlink", gone)
        kept.put("parity", "toy|good", 0.5)
    assert kept.get("parity", "toy|good") == 0.5
    assert "can't be written (Stale file handle)" in caplog.text


def test_only_an_op_that_exists_is_forgotten():
    with pytest.raises(ValueError, match="there is no op 'rmsnorm'; the ops are"):
        fasttrain_kernels.reset("rmsnorm")


def test_the_folder_is_the_variables_or_the_homes(own_cache, monkeypatch, tmp_path):
    assert store.directory() == own_cache / "kernels"
    monkeypatch.delenv("FASTTRAIN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.directory() == tmp_path / ".cache" / "fasttrain" / "kernels"
