"""Saved datasets are read; the hub out of reach is one line, at once."""

import json

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Json, List, Value
from source_rows import chats, load, turns

from fasttrain.config.errors import UserError
from fasttrain.config.schema.data import HuggingFaceSourceConfig
from fasttrain.data.sources import huggingface

PAIRS = {"question": ["q0", "q1", "q2"], "answer": ["a0", "a1", "a2"]}


@pytest.fixture
def saved(tmp_path, capfd):
    """A saved dataset and a saved dictionary of splits."""
    Dataset.from_dict(PAIRS).save_to_disk(tmp_path / "one")
    splits = {"train": Dataset.from_dict(PAIRS), "test": Dataset.from_list(chats(2))}
    DatasetDict(splits).save_to_disk(tmp_path / "two")
    capfd.readouterr()
    return tmp_path


def read(directory, **options):
    return load(HuggingFaceSourceConfig(name_or_path=str(directory), **options))


def refused(name, **options):
    with pytest.raises(UserError) as caught:
        read(name, **options)
    (line,) = str(caught.value).splitlines()
    return line


def test_a_saved_dataset(saved, capfd):
    rows = read(saved / "one")
    assert turns(rows.train[1]) == [("user", "q1"), ("assistant", "a1")]
    (report,) = rows.reports
    assert report.name == str(saved / "one")
    assert report.detected.startswith("question/answer (question, answer)")
    assert rows.train[1]["origin"] == f"{saved}/one: row 2"
    assert capfd.readouterr() == ("", "")


def test_splits_of_a_saved_dictionary(saved):
    assert len(read(saved / "two").train) == 3
    rows = read(saved / "two", split="test")
    assert turns(rows.train[1])[0] == ("user", "question 1")
    assert refused(saved / "two", split="dev") == (
        f"{saved}/two: no split 'dev'. There are: train, test. Choose one with split:."
    )


def test_the_saved_files_stay(saved):
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    read(saved / "one")
    assert before == {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}


def test_damaged_saved_datasets(saved):
    (saved / "one" / "state.json").write_text("{")
    assert f"{saved}/one: the saved dataset is damaged" in refused(saved / "one")
    arrow = next((saved / "two" / "train").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:100])
    assert f"{saved}/two: the saved dataset is damaged" in refused(saved / "two")
    dataset_info = saved / "two" / "dataset_dict.json"
    dataset_info.write_text(json.dumps({"splits": ["gone"]}))
    assert f"{saved}/two: the saved dataset is damaged" in refused(saved / "two")


def test_a_directory_of_something_else(tmp_path):
    line = refused(tmp_path)
    assert "not a directory written by datasets' save_to_disk" in line
    assert f"{{type: file, path: {tmp_path}}}" in line


def test_options_of_the_hub_do_not_fit_a_directory(saved):
    assert "config_name and revision belong to datasets of the hub" in refused(
        saved / "one", revision="main"
    )


@pytest.mark.parametrize("name", ["train.jsonl", "x/train.parquet", "./x", "/no/such", "a/b/c"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(huggingface.datasets, "load_dataset", None)
    assert refused(name) == f"{name}: no such file or directory."


def test_a_format_is_no_dataset():
    assert refused("json") == "json: a file format, not a dataset; give the file."


def test_the_hub_out_of_reach(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(huggingface, "hub_reachable", lambda: False)
    assert refused("somebody/some-dataset") == (
        "somebody/some-dataset: there is no such file here, and the hub cannot be reached. "
        "Check the name and the network, or give a local file."
    )
    assert capfd.readouterr() == ("", "")
    assert huggingface.datasets.config.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            huggingface.DatasetNotFoundError("Dataset 'x/y' doesn't exist"),
            "x/y: there is no such file here, and no such dataset on the hub. "
            "If it is private or gated, set HF_TOKEN.",
        ),
        (
            ValueError('Unknown split "dev". Should be one of ["train"].\nmore'),
            'x/y: cannot be loaded: Unknown split "dev". Should be one of ["train"].',
        ),
        (
            RuntimeError("Dataset scripts are no longer supported, but found y.py"),
            "x/y: cannot be loaded: Dataset scripts are no longer supported, but found y.py",
        ),
    ],
)
def test_what_datasets_says_becomes_one_line(error, line, monkeypatch):
    """The library's own errors, raised where it raises them: no test reaches the hub."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface, "hub_reachable", lambda: True)
    monkeypatch.setattr(huggingface.datasets, "load_dataset", fail)
    assert refused("x/y") == line


def test_columns_of_other_kinds_are_left_alone(tmp_path, capfd):
    """Images are never decoded; JSON inside of lists is."""
    features = Features(
        {
            "messages": List({"role": Value("string"), "content": Json()}),
            "image": Image(),
            "label": ClassLabel(names=["a", "b"]),
            "vector": List(Value("float32")),
        }
    )
    row = {**chats(1)[0], "image": {"path": None, "bytes": b"no image"}, "label": 0, "vector": [1]}
    row["messages"][0]["content"] = [{"type": "text", "text": "one"}]
    Dataset.from_list([row], features=features).save_to_disk(tmp_path / "saved")
    rows = read(tmp_path / "saved")
    assert turns(rows.train[0]) == [("user", "one"), ("assistant", "answer 0")]
    assert rows.reports[0].detected.endswith("not used: image, label, vector")
