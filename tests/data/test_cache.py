"""Tokenised rows are kept, found again, and never taken for what they are not."""

import json
import multiprocessing
import os
import signal
import stat
import time

import numpy as np
import pytest

from fasttrain.config.errors import Problem, UserError
from fasttrain.data.cache import cache_directory, tokenized
from fasttrain.data.encode import Chunk

INPUTS = {"rows": "abc", "tokenizer": "def", "chat template": "ghi", "max_length": "16"}


def chunk(*documents, first_row=0, source="train.jsonl"):
    made = Chunk(
        tokens=[np.array(ids, np.int32) for ids in documents],
        supervised=[np.array([False] + [True] * (len(ids) - 1)) for ids in documents],
        rows=list(range(first_row, first_row + len(documents))),
        sources=[source] * len(documents),
    )
    made.tally.drop(source, "longer than max_length", f"{source}:9")
    return made


def encode():
    yield chunk([1, 2, 3], [4, 5])
    yield chunk([6, 7, 8, 9], first_row=5, source="other.jsonl")


def never():
    raise AssertionError("the entry should have been found")
    yield


def check(made):
    documents = made.documents
    assert [documents[i][0].tolist() for i in range(3)] == [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    assert documents[2][1].tolist() == [False, True, True, True]
    assert documents.rows.tolist() == [0, 1, 5]
    assert [documents.source(i) for i in range(3)] == ["train.jsonl", "train.jsonl", "other.jsonl"]
    assert made.tally.reasons("other.jsonl") == {"longer than max_length (first: other.jsonl:9)": 1}


def entry_of(directory):
    [entry] = [path for path in directory.iterdir() if path.is_dir()]
    return entry


def test_the_second_run_finds_what_the_first_one_made(tmp_path):
    first = tokenized(tmp_path, INPUTS, encode)
    check(first)
    assert first.message.startswith("miss: nothing like it")
    second = tokenized(tmp_path, INPUTS, never)
    check(second)
    assert second.message == f"hit: {entry_of(tmp_path)}"


@pytest.mark.parametrize("name", INPUTS)
def test_another_input_is_a_miss_that_says_which(tmp_path, name):
    tokenized(tmp_path, INPUTS, encode)
    again = tokenized(tmp_path, {**INPUTS, name: "another"}, encode)
    assert again.message.startswith(f"miss: changed since before: {name};")
    assert tokenized(tmp_path, INPUTS, never).message.startswith("hit")


FILES = ["tokens.bin", "supervised.bin", "offsets.bin", "rows.bin", "source_ids.bin", "meta.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "empty"])
def test_a_damaged_entry_is_made_again_and_said(tmp_path, name, damage):
    tokenized(tmp_path, INPUTS, encode)
    path = entry_of(tmp_path) / name
    data = bytearray(path.read_bytes())
    path.unlink()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "empty":
        path.write_bytes(b"")
    again = tokenized(tmp_path, INPUTS, encode)
    check(again)
    assert again.message.startswith("miss: the entry is damaged")
    check(tokenized(tmp_path, INPUTS, never))
    assert len(list(tmp_path.glob("*/"))) == 1


def test_another_entrys_damage_does_no_harm(tmp_path):
    tokenized(tmp_path, INPUTS, encode)
    (entry_of(tmp_path) / "meta.json").write_text("[1, 2")
    made = tokenized(tmp_path, {**INPUTS, "rows": "others"}, encode)
    assert made.message.startswith("miss: nothing like it")


def test_problems_of_rows_are_raised_and_nothing_is_kept(tmp_path):
    def faulty():
        for number in range(30):
            bad = chunk([1, 2])
            bad.problems.append(Problem("is bad.", where=f"train.jsonl:{number}"))
            yield bad

    with pytest.raises(UserError) as caught:
        tokenized(tmp_path, INPUTS, faulty)
    assert str(caught.value).splitlines()[0] == "train.jsonl:0: is bad."
    assert len(caught.value.problems) == 10
    assert not list(tmp_path.glob("*/"))


def test_what_a_killed_run_left_is_no_entry_and_is_removed(tmp_path):
    def killed():
        yield chunk([1, 2, 3])
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(
        target=tokenized, args=(tmp_path, INPUTS, killed)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list(tmp_path.glob(".tmp-*"))
    check(tokenized(tmp_path, INPUTS, encode))
    assert not list(tmp_path.glob(".tmp-*"))


def count_and_encode(log):
    with open(log, "a") as file:
        file.write("made\n")
    time.sleep(0.2)
    yield from encode()


def make_in_process(directory, log, results):
    made = tokenized(directory, INPUTS, lambda: count_and_encode(log))
    results.put((made.message.partition(":")[0], made.documents.tokens.tolist()))


def test_two_processes_at_once_make_it_once(tmp_path):
    context = multiprocessing.get_context("fork")
    results, log = context.Queue(), tmp_path / "log"
    arguments = (tmp_path / "cache", log, results)
    processes = [context.Process(target=make_in_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert [word for word, _ in found] == ["hit", "hit", "miss"]
    assert all(tokens == list(range(1, 10)) for _, tokens in found)
    assert log.read_text() == "made\n"


def test_no_documents_at_all_can_be_kept(tmp_path):
    def nothing():
        empty = Chunk()
        empty.tally.drop("train.jsonl", "nothing to learn", "train.jsonl:1")
        yield empty

    for _ in range(2):
        made = tokenized(tmp_path, INPUTS, nothing)
        assert len(made.documents) == 0 and made.documents.num_tokens == 0
        assert made.tally.dropped.total() == 1


def test_a_directory_that_cannot_be_written_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("here already")
    with pytest.raises(UserError, match=r"data.cache_dir: .*FASTTRAIN_CACHE"):
        tokenized(tmp_path / "file" / "tokens", INPUTS, encode)


def test_where_the_cache_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FASTTRAIN_CACHE", raising=False)
    assert cache_directory(None) == tmp_path / "home" / ".cache" / "fasttrain" / "tokens"
    monkeypatch.setenv("FASTTRAIN_CACHE", str(tmp_path / "variable"))
    assert cache_directory(None) == tmp_path / "variable" / "tokens"
    assert cache_directory("~/mine") == tmp_path / "home" / "mine" / "tokens"


def test_an_entry_holds_no_pickle(tmp_path):
    tokenized(tmp_path, INPUTS, encode)
    entry = entry_of(tmp_path)
    assert sorted(path.name for path in entry.iterdir()) == sorted(FILES)
    _, text = json.loads((entry / "meta.json").read_text())
    assert json.loads(text)["inputs"] == INPUTS
    assert stat.S_ISDIR(entry.stat().st_mode)
