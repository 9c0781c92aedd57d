"""From sources to rows: names, drawing, holding out, hooks, and sums that add up."""

import pytest
from datasets import Dataset
from source_rows import FIXTURES, chats, load, turns, write_jsonl

from fasttrain.config.errors import UserError
from fasttrain.config.registry import SOURCES
from fasttrain.config.schema.data import (
    DataSection,
    FileSourceConfig,
    SourceSection,
)
from fasttrain.core.events import Callback, Hooks
from fasttrain.core.interfaces import Examples, Source
from fasttrain.data.load import load_rows
from fasttrain.data.normalise import NORMAL_COLUMNS, NOT_DRAWN


class TableConfig(SourceSection):
    """Rows given in the config."""

    type: str = "table_of_the_tests"
    rows: int = 4
    groups: int = 0


class Table(Source):
    Config = TableConfig
    note = "made up"

    def load(self):
        numbers = range(self.config.rows)
        table = {
            "question": [f"q{n}" for n in numbers],
            "answer": [f"a{n}" for n in numbers],
        }
        if self.config.groups:
            table["group"] = [n % self.config.groups for n in numbers]
        return Dataset.from_dict(table)


@pytest.fixture(autouse=True)
def _table_source():
    SOURCES.register("table_of_the_tests")(Table)  # tests/conftest.py takes it out again


def questions(rows):
    return [turns(row)[0][1] for row in rows]


# --- sources --------------------------------------------------------------------------------------


def test_sources_are_concatenated_in_order_with_their_names(tmp_path):
    path = write_jsonl(tmp_path / "chat.jsonl", chats(2))
    rows = load(FIXTURES / "gsm8k.jsonl", FileSourceConfig(path=str(path), name="mine"))
    assert rows.train.column_names == list(NORMAL_COLUMNS)
    assert rows.train["source"][:] == [str(FIXTURES / "gsm8k.jsonl")] * 7 + ["mine"] * 2
    assert [report.name for report in rows.reports] == [str(FIXTURES / "gsm8k.jsonl"), "mine"]
    assert rows.train[8]["origin"] == f"{path}:2"


def test_one_source_may_be_given_twice(tmp_path):
    path = write_jsonl(tmp_path / "chat.jsonl", chats(2))
    rows = load(path, path)
    assert len(rows.train) == 4
    assert [report.name for report in rows.reports] == [str(path), f"{path} (2)"]


def test_conversations_and_text_lie_side_by_side():
    rows = load(FIXTURES / "shakespeare.txt", FIXTURES / "toy_chat.jsonl")
    assert rows.train["kind"][:] == ["text"] * 2 + ["conversation"] * 4
    assert rows.has_conversations
    texts = list(rows.texts())
    assert texts[0].startswith("First Citizen:") and "Golf is fun too!" in texts


def test_a_source_of_ones_own():
    rows = load(TableConfig(rows=3))
    assert questions(rows.train) == ["q0", "q1", "q2"]
    (report,) = rows.reports
    assert report.name == "table_of_the_tests"
    assert report.detected == "question/answer (question, answer), by column name; made up"
    assert rows.train[2]["origin"] == "table_of_the_tests: row 3"


def test_load_source_is_wrapped_once_for_each_source():
    class Shorten(Callback):
        calls = 0

        def wrap_load_source(self, run, call, *args):
            self.calls += 1
            rows = call(*args)
            return rows.select(range(2))

    shorten = Shorten()
    hooks = Hooks([shorten])
    hooks.bind(object())  # the wrapper is told of a run, and asks nothing of it
    rows = load(TableConfig(), FIXTURES / "gsm8k.jsonl", hooks=hooks)
    assert shorten.calls == 2
    assert [report.rows for report in rows.reports] == [2, 2]
    assert rows.train[2]["origin"].endswith("gsm8k.jsonl:1")


def test_a_source_that_returns_something_else(monkeypatch):
    monkeypatch.setattr(Table, "load", lambda self: [{"question": "q"}])
    with pytest.raises(
        TypeError, match=r"load\(\) returned list; it must return a datasets.Dataset"
    ):
        load(TableConfig())


def test_a_source_without_rows(monkeypatch):
    monkeypatch.setattr(Table, "load", lambda self: Dataset.from_dict({"question": []}))
    with pytest.raises(UserError, match=r"data.sources\[0\]: source 't' has no rows"):
        load(TableConfig(name="t"))


# --- drawing --------------------------------------------------------------------------------------


def test_max_samples_of_a_source(tmp_path):
    path = write_jsonl(tmp_path / "chat.jsonl", chats(100))
    source = FileSourceConfig(path=str(path), max_samples=10)
    rows = load(source)
    numbers = [int(question.split()[1]) for question in questions(rows.train)]
    assert len(numbers) == 10 and numbers == sorted(numbers) and numbers != list(range(10))
    assert rows.train[0]["origin"] == f"{path}:{numbers[0] + 1}"
    (report,) = rows.reports
    assert (report.rows, report.used, report.dropped) == (100, 10, {NOT_DRAWN: 90})
    assert questions(load(source).train) == questions(rows.train)
    assert questions(load(source, seed=1).train) != questions(rows.train)


def test_max_samples_of_all(tmp_path):
    rows = load(TableConfig(rows=30), TableConfig(rows=50, max_samples=20), max_samples=24)
    assert len(rows.train) == 24
    assert sum(report.used for report in rows.reports) == 24
    assert all(report.rows == report.used + sum(report.dropped.values()) for report in rows.reports)
    assert all(report.used > 0 for report in rows.reports)


def test_more_samples_than_rows_are_all_rows():
    assert len(load(TableConfig(rows=5, max_samples=50), max_samples=100).train) == 5


def test_a_source_of_which_nothing_is_drawn():
    rows = load(TableConfig(rows=500), FIXTURES / "vicuna.json", max_samples=1)
    assert (len(rows.train), [report.used for report in rows.reports]) == (1, [1, 0])
    assert rows.reports[1].detected.startswith("ShareGPT")


def test_only_drawn_rows_are_checked(tmp_path):
    rows = chats(100)
    rows[50]["messages"] = []
    path = write_jsonl(tmp_path / "chat.jsonl", rows)
    source = FileSourceConfig(path=str(path), max_samples=3)
    assert load(source).reports[0].used == 3


# --- holding out ----------------------------------------------------------------------------------


def test_a_share_of_the_rows_is_held_out():
    rows = load(TableConfig(rows=200), eval_split=0.1)
    train, held = questions(rows.train), questions(rows.evaluation)
    assert (len(train), len(held)) == (180, 20)
    assert sorted(train + held) == sorted(f"q{n}" for n in range(200))
    assert rows.reports[0].used == 200
    assert held == sorted(held, key=lambda question: int(question[1:]))  # order is kept
    assert set(questions(load(TableConfig(rows=200), eval_split=0.1, seed=1).evaluation)) != set(
        held
    )


def test_the_held_out_rows_do_not_depend_on_the_order(tmp_path):
    rows = chats(60)
    forward = write_jsonl(tmp_path / "a.jsonl", rows)
    backward = write_jsonl(tmp_path / "b.jsonl", rows[::-1])
    split = [set(questions(load(path, eval_split=0.2).evaluation)) for path in (forward, backward)]
    first, second = write_jsonl(tmp_path / "c.jsonl", rows[:25]), tmp_path / "d.jsonl"
    write_jsonl(second, rows[25:])
    split.append(set(questions(load(second, first, eval_split=0.2).evaluation)))
    assert split[0] == split[1] == split[2]


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5])
def test_groups_are_held_out_whole(share):
    rows = load(TableConfig(rows=400, groups=40), eval_split=share)
    train, held = set(rows.train["group"]), set(rows.evaluation["group"])
    assert not train & held and train | held == {str(n) for n in range(40)}
    assert len(rows.evaluation) == share * 400
    assert "rows grouped by column group" in rows.reports[0].detected


def test_equal_rows_are_held_out_together(tmp_path):
    path = write_jsonl(tmp_path / "chat.jsonl", chats(20) * 3)
    rows = load(path, eval_split=0.3)
    assert not set(questions(rows.train)) & set(questions(rows.evaluation))
    assert len(rows.evaluation) == 18


def test_a_large_group_is_passed_over(tmp_path):
    """A group larger than the share would empty the training data."""
    rows = chats(90, group="large") + [
        {**chat, "group": f"small {n}"} for n, chat in enumerate(chats(20)[10:])
    ]
    path = write_jsonl(tmp_path / "chat.jsonl", rows)
    for seed in range(5):
        held = load(path, eval_split=0.05, seed=seed).evaluation
        assert len(held) == 5 and "large" not in held["group"]


def test_each_side_has_a_row(tmp_path):
    two = write_jsonl(tmp_path / "two.jsonl", chats(2))
    for share in (0.001, 0.999, 1.0):
        rows = load(two, eval_split=share)
        assert (len(rows.train), len(rows.evaluation)) == (1, 1)
    for count in (1, 3):
        path = write_jsonl(tmp_path / "same.jsonl", chats(1) * count)
        with pytest.raises(UserError, match=r"data.eval_split: there is nothing to hold out"):
            load(path, eval_split=0.1)


def test_sources_of_their_own_for_evaluation(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", chats(5))
    held = write_jsonl(tmp_path / "held.jsonl", chats(3))
    rows = load(
        train, eval_sources=[FileSourceConfig(path=str(held), max_samples=2)], max_samples=4
    )
    assert (len(rows.train), len(rows.evaluation)) == (4, 2)
    assert [report.name for report in rows.reports] == [str(train), str(held)]
    assert rows.evaluation["source"][0] == str(held)
    with pytest.raises(UserError, match=r"data\.eval_split: excludes eval_sources"):
        load(train, eval_sources=[FileSourceConfig(path=str(held))], eval_split=0.1)


def test_a_mistake_in_an_evaluation_source_names_it(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", chats(5))
    held = write_jsonl(tmp_path / "held.jsonl", [{"x": 1}])
    with pytest.raises(UserError, match=r"data.eval_sources\[0\]: cannot tell what the rows are"):
        load(train, eval_sources=[FileSourceConfig(path=str(held))])


# --- the same rows everywhere ---------------------------------------------------------------------


TRAIN = [
    "q1",
    "q2",
    "q8",
    "q11",
    "q14",
    "q16",
    "q18",
    "q21",
    "q22",
    "q25",
    "q26",
    "q30",
    "q32",
    "q35",
    "q36",
    "q37",
]
HELD = ["q4", "q13", "q19", "q24"]


def test_rows_are_the_same_on_every_machine():
    """Sampling and splitting are pinned: a change here silently changes everyone's data."""
    section = DataSection(sources=(TableConfig(rows=40, max_samples=20),), eval_split=0.2)
    rows = load_rows(section, examples=Examples(), seed=42, hooks=Hooks())
    assert questions(rows.train) == TRAIN
    assert questions(rows.evaluation) == HELD
