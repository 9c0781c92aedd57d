"""bench/train: that the comparison runs, and that what it compares is what it says."""

import importlib
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).resolve().parents[2] / "bench" / "train"


@pytest.fixture
def load(monkeypatch):
    """A module of the harness, which runs as scripts and is no package."""
    monkeypatch.syspath_prepend(str(HARNESS))
    yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(HARNESS)):
            monkeypatch.delitem(sys.modules, name)


def words(text):
    return [match.span() for match in re.finditer(r"\S+", text)]


def make(load, count, **options):
    chat_data = load("chat_data")
    modules = chat_data.stdlib_modules()[:40]
    return list(chat_data.make_chats(count, modules, words, **{"scale": 1.0, "seed": 0, **options}))


def test_the_same_python_gives_the_same_chats(load):
    assert make(load, 30) == make(load, 30)
    assert make(load, 30) != make(load, 30, seed=1)


def test_chats_have_the_length_profile(load):
    chats = make(load, 200)
    per_message = load("chat_data").TOKENS_PER_MESSAGE
    lengths = [
        sum(len(message["content"].split()) + per_message for message in chat) for chat in chats
    ]
    cuts = statistics.quantiles(lengths, n=10, method="inclusive")
    assert (cuts[0], cuts[4], cuts[8]) == pytest.approx((52, 136, 440), rel=0.05)
    assert max(lengths) < 1544


def test_chats_alternate_and_half_of_the_tokens_are_answers(load):
    chats = make(load, 200)
    count = {"user": 0, "assistant": 0}
    for chat in chats:
        assert [m["role"] for m in chat] == ["user", "assistant"] * (len(chat) // 2)
        for message in chat:
            assert message["content"]
            count[message["role"]] += len(message["content"].split())
    assert count["assistant"] / sum(count.values()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_epoch_in_miniature_pads_as_much_as_the_epoch(load, seed):
    chat_data, instruments = load("chat_data"), load("instruments")
    measure, workloads = load("measure"), load("workload").WORKLOADS
    rows, workload = workloads["cpu"].rows, workloads["cpu"]
    lengths = [chat_data.length_at((i + 0.5) / 2000, 1.0) for i in range(2000)]
    # Of like length: the case where few batches could mislead most.
    order = sorted(range(2000), key=lengths.__getitem__)
    job = measure.Job(HARNESS, HARNESS, "grouped", seed, workload)
    drawn = list(instruments.EpochInMiniature(order, lengths, rows, job))
    assert len(drawn) == len(set(drawn)) == rows * workload.total_steps
    measured = drawn[rows * workload.warmup :]
    batches = [measured[i : i + rows] for i in range(0, len(measured), rows)]
    tokens = sum(lengths[index] for index in measured)
    cells = sum(rows * max(lengths[index] for index in batch) for batch in batches)
    assert tokens / cells > 0.9
    assert tokens / len(measured) == pytest.approx(sum(lengths) / 2000, rel=0.2)


def test_throughput_leaves_the_warm_up_out(load):
    measure = load("measure")
    watch = measure.Stopwatch(warmup=2)
    for _ in range(4):
        watch.step_ended(4)
    watch.ends = [10.0, 11.0, 13.0, 14.0]
    watch._cpu_seconds = [1.0, 3.0]
    counts = [
        measure.BatchCount(*sizes) for sizes in [(9, 9, 9), (9, 9, 9), (40, 20, 80), (20, 10, 40)]
    ]
    found = measure.throughput(counts, watch)
    assert found["seconds"] == 3.0
    assert found["tokens_per_second"] == 20.0
    assert found["supervised_tokens_per_second"] == 10.0
    assert found["tokens_per_cpu_second"] == 30.0
    assert found["padding"] == 0.5


def test_ratios_say_how_much_better_fasttrain_is(load):
    summary = load("summary")

    def runs(*speeds, memory):
        return summary.summarise(
            [{"tokens_per_second": speed, "peak_rss_bytes": memory} for speed in speeds]
        )

    found = summary.ratios({"fasttrain": runs(90, 100, 400, memory=2), "other": runs(50, memory=6)})
    assert found == {"other": {"speed": 2.0, "memory": 3.0}}


def test_a_section_is_replaced_and_the_others_stay(load, tmp_path):
    write = load("results").write_section
    write(tmp_path / "here" / "train.json", "trainer", {"a": 1})
    write(tmp_path / "here" / "train.json", "peers", {"b": 1})
    write(tmp_path / "here" / "train.json", "trainer", {"a": 2})
    assert json.loads((tmp_path / "here" / "train.json").read_text()) == {
        "trainer": {"a": 2},
        "peers": {"b": 1},
    }


@pytest.mark.slow
def test_the_comparison_runs(tmp_path):
    """As `make bench-train` does, with tiny sizes: what its figures count, not what they are."""
    kept = tmp_path / "train.json"
    command = [sys.executable, str(HARNESS / "run.py"), "--quick", "--threads", "1"]
    command += ["--contenders", "fasttrain", "trainer-grouped", "--results", str(kept)]
    command += ["--work", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(kept.read_text())["trainer"]
    assert found["loss_checks"]["fasttrain"]["equal"]
    assert found["ratios"].keys() == {"trainer-grouped"}
    packed = found["contenders"]["fasttrain"]["runs"][0]
    padded = found["contenders"]["trainer-grouped"]["runs"][0]
    assert packed["steps"] == padded["steps"] == found["workload"]["steps"]
    assert packed["padding"] == 0 < padded["padding"]
    assert packed["supervised_tokens"] < packed["tokens"]
    assert "fasttrain" in done.stdout
