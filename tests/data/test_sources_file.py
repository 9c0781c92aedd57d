"""Local files of public datasets load with no other option, whatever container they come in."""

import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from source_rows import FIXTURES, chats, load, turns, write_jsonl

from fasttrain.config.errors import UserError
from fasttrain.config.schema.data import FileSourceConfig
from fasttrain.data.sources.file import FileSource
from fasttrain.data.sources.txt import PASSAGE_CHARACTERS

# file → rows, what is detected, the first row's roles, the last words of its answer
DATASETS = {
    "gsm8k.jsonl": (7, "question/answer (question, answer)", ["user", "assistant"], "#### 72"),
    "toy_chat.jsonl": (
        4,
        "conversations (messages)",
        ["system", "user", "assistant"],
        "getting exercise outdoors!",
    ),
    "identity.json": (
        10,
        "alpaca (instruction, input, output)",
        ["user", "assistant"],
        "How can I assist you today?",
    ),
    "vicuna.json": (
        6,
        "ShareGPT conversations (conversations)",
        ["user", "assistant", "user", "assistant"],
        "You too!",
    ),
    "super_bowl.jsonl": (
        8,
        "prompt/completion (prompt, completion)",
        ["user", "assistant"],
        "257 yards in Super Bowl LIX.",
    ),
}


def rows_of(name):
    text = (FIXTURES / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else list(map(json.loads, text.splitlines()))


def as_jsonl(rows, path):
    return write_jsonl(path.with_suffix(".jsonl"), rows)


def as_json(rows, path):
    path = path.with_suffix(".json")
    path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    return path


def as_wrapped_json(rows, path):
    path = path.with_suffix(".json")
    path.write_text(json.dumps({"version": "1.0", "data": rows}), encoding="utf-8")
    return path


def as_parquet(rows, path):
    path = path.with_suffix(".parquet")
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def as_gzip(rows, path):
    path = path.with_suffix(".jsonl.gz")
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def as_csv(rows, path):
    path = path.with_suffix(".csv")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {
                    key: value if isinstance(value, str) else json.dumps(value)
                    for key, value in row.items()
                }
            )
    return path


CONTAINERS = [as_jsonl, as_json, as_wrapped_json, as_parquet, as_gzip, as_csv]


@pytest.mark.parametrize("name", DATASETS)
def test_each_public_format_is_recognised(name):
    count, detected, roles, ending = DATASETS[name]
    rows = load(FIXTURES / name)
    (report,) = rows.reports
    assert report.detected.startswith(detected)
    assert (report.rows, report.used, dict(report.dropped)) == (count, count, {})
    assert rows.has_conversations and rows.evaluation is None
    first = rows.train[0]
    assert [role for role, _ in turns(first)] == roles
    assert turns(first)[-1][1].endswith(ending)
    assert first["kind"] == "conversation" and first["text"] == "" and first["group"] == ""


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", DATASETS)
def test_the_container_changes_nothing(name, container, tmp_path):
    """Messages equal those of the published file, in any container."""
    expected = [row["messages"] for row in load(FIXTURES / name).train]
    path = container(rows_of(name), tmp_path / "rows")
    before = path.read_bytes()
    assert [row["messages"] for row in load(path).train] == expected
    assert path.read_bytes() == before


def test_messages_are_those_of_the_file():
    raw = rows_of("toy_chat.jsonl")
    for row, published in zip(load(FIXTURES / "toy_chat.jsonl").train, raw, strict=True):
        assert json.loads(row["messages"]) == published["messages"]


def test_tool_calls_in_sharegpt():
    (row,) = load(FIXTURES / "tool_calls.json").train
    messages = json.loads(row["messages"])
    assert [message["role"] for message in messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ] * 2
    arguments = {"shape": "rectangle", "dimensions": [5, 3]}
    function = {"name": "calculate_area", "arguments": arguments}
    assert messages[1]["tool_calls"] == [{"type": "function", "function": function}]
    assert messages[1]["content"] is None
    assert messages[2]["content"] == '{"area": 15}'


def test_plain_text_is_cut_between_paragraphs_and_nothing_is_lost():
    path = FIXTURES / "shakespeare.txt"
    rows = load(path)
    texts = list(rows.texts())
    assert len(texts) == 2 and not rows.has_conversations
    assert all(0 < len(text) <= PASSAGE_CHARACTERS for text in texts)
    assert "\n\n".join(texts) == path.read_text(encoding="utf-8").strip("\n")
    assert all(text.splitlines()[0].endswith(":") for text in texts)  # a speaker begins each
    assert "passages of at most 2,048 characters" in rows.reports[0].detected
    lines = path.read_text(encoding="utf-8").splitlines()
    origins = [int(row["origin"].rpartition(":")[2]) for row in rows.train]
    assert [lines[number - 1] for number in origins] == [text.splitlines()[0] for text in texts]


def test_plain_text_without_paragraphs(tmp_path):
    path = tmp_path / "lines.txt"
    lines = [f"line {number} " + "x" * 300 for number in range(40)] + ["y" * 5000, "end"]
    path.write_text("\r\n".join(lines), encoding="utf-8")
    texts = list(load(path).texts())
    assert "\n".join(texts).split("\n") == lines
    assert [len(text) for text in texts if len(text) > PASSAGE_CHARACTERS] == [5000]


def test_several_files_keep_their_order_and_their_lines(tmp_path):
    rows = chats(6)
    write_jsonl(tmp_path / "b.jsonl", rows[3:])
    write_jsonl(tmp_path / "a.jsonl", rows[:3])
    (tmp_path / "README.md").write_text("# about")
    for path in (tmp_path, tmp_path / "*.jsonl"):
        train = load(path).train
        assert [turns(row)[0][1] for row in train] == [f"question {n}" for n in range(6)]
        origins = [row["origin"].rpartition("/")[2] for row in train]
        assert origins[2:4] == ["a.jsonl:3", "b.jsonl:1"]


def test_origins_count_blank_lines(tmp_path):
    path = tmp_path / "train.jsonl"
    first, second = (json.dumps(row) for row in chats(2))
    path.write_text(f"\n{first}\n  \n\n{second}")
    assert [row["origin"].rpartition(":")[2] for row in load(path).train] == ["2", "5"]


def test_rows_of_a_json_array_carry_their_line(tmp_path):
    path = as_json(chats(3), tmp_path / "rows")
    lines = path.read_text().splitlines()
    for row in load(path).train:
        assert lines[int(row["origin"].rpartition(":")[2]) - 1].strip() == "{"


def test_json_lines_under_the_name_json(tmp_path):
    path = write_jsonl(tmp_path / "train.json", chats(3))
    rows = load(path)
    assert rows.reports[0].used == 3
    assert rows.train[2]["origin"].endswith("train.json:3")


def test_a_single_row_is_no_list_of_rows(tmp_path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(chats(1)[0]))
    assert load(path).reports[0].used == 1


def test_byte_order_mark_and_windows_lines(tmp_path):
    path = tmp_path / "train.jsonl"
    lines = "\r\n".join(json.dumps(row) for row in chats(2))
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\r\n")
    assert load(path).reports[0].used == 2


def test_line_separators_inside_text_end_no_row(tmp_path):
    rows = chats(2)
    rows[0]["messages"][1]["content"] = "one\u2028two\x85three\x0bfour"
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert turns(load(path).train[0])[1][1] == "one\u2028two\x85three\x0bfour"


def test_rows_need_not_agree_on_what_is_inside(tmp_path):
    """No nulls are added to objects, whatever other rows hold; late columns and types are kept."""
    rows = chats(1500)
    call = {"name": "weather", "arguments": {"city": "Oslo", "unit": None}}
    rows[0]["messages"][1] = {"role": "assistant", "tool_calls": [call]}
    other = {"name": "add", "arguments": {"a": 1, "b": 2.5}}
    rows[1]["messages"][1] = {"role": "assistant", "tool_calls": [other]}
    rows[1200]["late"] = {"x": 1}
    for number, value in ((3, 1), (4, 2.5), (1400, "three"), (1450, 2**70)):
        rows[number]["mixed"] = value
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    loaded = FileSource(FileSourceConfig(path=str(path))).load()
    assert [loaded[n]["mixed"] for n in (2, 3, 4, 1400)] == [None, 1, 2.5, "three"]
    assert loaded[1200]["late"] == {"x": 1} and loaded[0]["late"] is None
    train = load(path).train
    calls = [json.loads(train[n]["messages"])[1]["tool_calls"][0]["function"] for n in (0, 1)]
    assert calls == [call, other]


def test_parquet_nulls_are_absent_fields(tmp_path):
    """Arrow gives every object of a column all fields; those a row lacks come back as nulls."""
    rows = chats(2)
    rows[0]["messages"][1]["tool_calls"] = [{"name": "f", "arguments": {"a": 1}}]
    rows[1]["messages"][1]["tool_calls"] = [{"name": "g", "arguments": {"b": "x"}}]
    train = load(as_parquet(rows, tmp_path / "rows")).train
    arguments = [
        json.loads(row["messages"])[1]["tool_calls"][0]["function"]["arguments"] for row in train
    ]
    assert arguments == [{"a": 1}, {"b": "x"}]
    assert "name" not in json.loads(train[0]["messages"])[0]


def test_parquet_types_that_datasets_decodes(tmp_path):
    path = tmp_path / "rows.parquet"
    table = pa.table(
        {
            "question": pa.array(["a", "b", "a"]).dictionary_encode(),
            "answer": pa.array(["x", "y", "z"], pa.large_string()),
        }
    )
    pq.write_table(table, path, row_group_size=2)
    train = load(path).train
    assert [turns(row)[1][1] for row in train] == ["x", "y", "z"]
    assert train[2]["origin"].endswith("rows.parquet:row 3")


def test_csv_with_quotes_and_long_cells(tmp_path):
    long = "word " * 50_000  # more than the csv module's own limit of 131,072 characters
    path = tmp_path / "qa.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("question", "answer"), ('say\n"hi", please', "hi"), ("go on", long)])
    train = load(path).train
    assert turns(train[0]) == [("user", 'say\n"hi", please'), ("assistant", "hi")]
    assert turns(train[1])[1][1] == long
    assert [row["origin"].rpartition(":")[2] for row in train] == ["2", "4"]


def test_a_source_returns_a_mapped_dataset_and_leaves_no_cache(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    path = write_jsonl(tmp_path / "train.jsonl", chats(2500))
    rows = FileSource(FileSourceConfig(path=str(path))).load()
    assert isinstance(rows, Dataset) and len(rows) == 2500
    assert rows[2499]["messages"][0]["content"] == "question 2499"
    load(path)
    assert not (tmp_path / "hf").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["train.jsonl"]
    assert capfd.readouterr() == ("", "")


def test_equal_rows_give_equal_fingerprints(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", chats(10))
    assert load(path).train._fingerprint == load(path).train._fingerprint
    other = write_jsonl(tmp_path / "b.jsonl", chats(11))
    assert load(path).train._fingerprint != load(other).train._fingerprint


def test_a_column_named_like_ours_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", chats(1, _origin="x"))
    with pytest.raises(UserError, match="column '_origin': fasttrain uses this name itself"):
        load(path)


def test_numbers_inside_tool_calls_are_not_rounded(tmp_path):
    arguments = {"x": 0.1234567890123456789, "n": 12345678901234567890123, "e": 1e-300}
    rows = chats(1)
    rows[0]["messages"][1] = {
        "role": "assistant",
        "tool_calls": [{"name": "f", "arguments": arguments}],
    }
    (row,) = load(write_jsonl(tmp_path / "train.jsonl", rows)).train
    call = json.loads(row["messages"])[1]["tool_calls"][0]
    assert call["function"]["arguments"] == arguments
