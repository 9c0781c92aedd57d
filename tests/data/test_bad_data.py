"""Files that are damaged or malformed: one clear line each, and nothing on disk changes."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_rows import FIXTURES, chats, load, write_jsonl

from fasttrain.config.errors import UserError

REAL_FILE = pa.OSFile
GOOD = json.dumps(chats(1)[0]).encode()


def refused(*sources, **options):
    """The lines of the error, with paths cut down to file names."""
    with pytest.raises(UserError) as caught:
        load(*sources, **options)
    return str(caught.value).splitlines()


def write(path, *lines):
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


# --- a line of a JSON Lines file ------------------------------------------------------------------

BAD_LINES = {
    b'{"messages": [': ("train.jsonl:3", "invalid JSON at column 15"),
    b'{"messages" 1}': ("train.jsonl:3", "invalid JSON at column 13"),
    b'{"messages": []} x': ("train.jsonl:3", "invalid JSON at column 18"),
    b"{": ("train.jsonl:3", "every row must stand on one line"),
    b'{"a": "caf\xe9"}': ("train.jsonl:3:11", "invalid UTF-8 (byte 0xe9)"),
    b'{"a": "b\x00"}': ("train.jsonl:3:9", "NUL byte"),
    b'{"a": "\\ud83d"}': ("train.jsonl:3", "half a surrogate pair, \\ud83d"),
    b"17": ("train.jsonl:3", "not a JSON object but the number 17"),
    b'"hello"': ("train.jsonl:3", "not a JSON object but the text 'hello'"),
    b"[1, 2]": ("train.jsonl:3", "not a JSON object but a list"),
    b"[" * 100_000: ("train.jsonl:3", "nested too deeply"),
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:12])
def test_a_malformed_line_is_named_by_file_and_line(line, tmp_path):
    path = write(tmp_path / "train.jsonl", GOOD, GOOD, line, GOOD)
    before = path.read_bytes()
    where, what = BAD_LINES[line]
    first, last = refused(path)
    assert first.startswith(f"{tmp_path}/{where}: ") and what in first
    assert last == "1 of 4 rows cannot be learnt from. Mend them, or set data.invalid: drop."
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:12])
def test_a_malformed_line_is_dropped_when_asked(line, tmp_path):
    path = write(tmp_path / "train.jsonl", GOOD, GOOD, line, GOOD)
    rows = load(path, invalid="drop")
    (report,) = rows.reports
    assert (report.rows, report.used, len(rows.train)) == (4, 3, 3)
    ((reason, count),) = report.dropped.items()
    assert count == 1 and "(first: " in reason and ":3" in reason


def test_many_problems_are_told_at_once_but_not_all(tmp_path):
    path = write(tmp_path / "train.jsonl", GOOD, *[b"{"] * 30)
    lines = refused(path)
    assert len(lines) == 11
    assert [line.split(":")[1] for line in lines[:10]] == [str(n) for n in range(2, 12)]
    assert lines[-1].startswith("30 of 31 rows cannot be learnt from.")


@pytest.mark.parametrize("policy", ["error", "drop"])
def test_no_usable_row_is_an_error_under_either_policy(policy, tmp_path):
    path = write(tmp_path / "train.jsonl", b"{", b"nonsense")
    assert refused(path, invalid=policy)[-1] == "none of the 2 rows can be learnt from."


# --- whole files ----------------------------------------------------------------------------------


def parquet_bytes(tmp_path):
    path = tmp_path / "source.parquet"
    pq.write_table(pa.Table.from_pylist(chats(200)), path)
    return path.read_bytes()


WHOLE_FILES = {
    "empty.jsonl": (b"", "the file is empty"),
    "empty.txt": (b"", "the file is empty"),
    "empty.parquet": (b"", "the file is empty"),
    "blank.jsonl": (b"\n  \n", "holds no rows"),
    "blank.txt": (b"\n  \n", "holds no rows"),
    "header.csv": (b"question,answer\n", "holds no rows"),
    "none.json": (b"[]", "holds no rows"),
    "array.jsonl": (b"[" + GOOD + b"]", "this is a JSON array, not one row per line, not .jsonl"),
    "page.jsonl": (b"<!DOCTYPE html><html>", "this is an HTML or XML page, not .jsonl"),
    "page.csv": (b"\n<html>", "this is an HTML or XML page"),
    "page.parquet": (b"<html>", "this is an HTML or XML page"),
    "rows.parquet": (GOOD, "this is no Parquet file"),
    "rows.csv": (GOOD, "this is JSON, not .csv"),
    "packed.jsonl": (gzip.compress(GOOD, mtime=0), "this is gzip-compressed, not .jsonl. Add .gz"),
    "packed.json": (b"PK\x03\x04rest", "a zip archive or a spreadsheet"),
    "pickle.json": (b"\x80\x04\x95rest", "pickles are never read"),
    "utf16.jsonl": ("{}".encode("utf-16"), "this is UTF-16 text"),
    "utf16.txt": ("hello".encode("utf-16"), "this is UTF-16 text"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
    "plain.jsonl.gz": (GOOD, "the gzip file is truncated or damaged"),
    "cut.jsonl.gz": (
        gzip.compress(GOOD * 100, mtime=0)[:-12],
        "the gzip file is truncated or damaged",
    ),
    "cut.json": (b"[" + GOOD + b",\n" + GOOD, "cut.json:2: expected ',' or ']' after a row"),
    "cut2.json": (b"[" + GOOD + b',\n{"a": ', "cut2.json:2: invalid JSON at column 7"),
    "more.json": (b"[" + GOOD + b"]\n[]", "more follows after the array"),
    "latin.json": (b'[\n{"a": "\xe9"}]', "latin.json:2:8: invalid UTF-8 (byte 0xe9)"),
    "lists.json": (b'{"a": [{"x": 1}], "b": [{"x": 1}]}', "several lists of rows (a, b)"),
    "twice.csv": (b"a,a\n1,2\n", "twice.csv:1: the header names 'a' twice"),
    "semicolon.csv": (b"question;answer\n1;2\n", "semicolon.csv:1: the header has no comma"),
    "open.csv": (b'question,answer\n"never closed,1\n2,3\n', "open.csv:2: a broken CSV record"),
    "latin.csv": (b"question,r\xe9ponse\n1,2\n", "latin.csv:1:11: invalid UTF-8"),
}


@pytest.mark.parametrize("name", WHOLE_FILES)
def test_a_file_that_is_not_what_it_should_be(name, tmp_path):
    content, what = WHOLE_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    (line,) = refused(path, invalid="drop")
    assert name in line and what in line
    assert path.read_bytes() == content


def test_parquet_under_another_name(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(parquet_bytes(tmp_path))
    (line,) = refused(path)
    assert line == f"{path}: this is a Parquet file, not .jsonl. Rename it to .parquet."


@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_truncated_parquet(kept, tmp_path):
    content = parquet_bytes(tmp_path)
    path = tmp_path / "cut.parquet"
    path.write_bytes(content[: int(kept * len(content))])
    (line,) = refused(path)
    assert line.startswith(f"{path}: the Parquet file is truncated or damaged")


def test_parquet_with_damaged_pages(tmp_path):
    content = bytearray(parquet_bytes(tmp_path))
    content[200:1200] = b"\xff" * 1000
    path = tmp_path / "damaged.parquet"
    path.write_bytes(content)
    (line,) = refused(path)
    assert line.startswith(f"{path}: the Parquet file is truncated or damaged")


def test_parquet_files_of_other_columns(tmp_path):
    pq.write_table(pa.table({"question": ["a"], "answer": ["b"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"question": ["a"], "reply": ["b"]}), tmp_path / "b.parquet")
    (line,) = refused(tmp_path)
    assert "b.parquet: other columns than in" in line and "as separate sources" in line


def test_csv_rows_of_another_width(tmp_path):
    path = write(tmp_path / "qa.csv", b"question,answer", b"a,b", b"c", b"d,e,f", b"g,h")
    lines = refused(path)
    assert f"{path}:3: wrong number of fields (1; the header has 2)." == lines[0]
    assert f"{path}:4: wrong number of fields (3; the header has 2)." == lines[1]
    assert load(path, invalid="drop").reports[0].used == 2


def test_a_bad_byte_in_plain_text(tmp_path):
    path = write(tmp_path / "book.txt", b"one", b"caf\xe9", b"three")
    assert refused(path)[0] == f"{path}:2:4: invalid UTF-8 (byte 0xe9)."
    assert list(load(path, invalid="drop").texts()) == ["one\nthree"]


# --- paths ----------------------------------------------------------------------------------------


def test_a_missing_file_suggests_the_nearest(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", chats(1))
    (line,) = refused(tmp_path / "trian.jsonl")
    assert line == f"{tmp_path}/trian.jsonl: no such file. Did you mean {tmp_path}/train.jsonl?"
    (line,) = refused(tmp_path / "nowhere" / "train.jsonl")
    assert f"There is no directory {tmp_path}/nowhere either" in line


def test_a_pattern_that_matches_nothing(tmp_path):
    (line,) = refused(tmp_path / "*.jsonl")
    assert "no file matches this pattern" in line


def test_a_suffix_that_is_not_read(tmp_path):
    (tmp_path / "train.xlsx").write_bytes(b"PK\x03\x04")
    (line,) = refused(tmp_path / "train.xlsx")
    assert "files of this kind are not read ('.xlsx')" in line and ".jsonl" in line


def test_directories(tmp_path):
    (line,) = refused(tmp_path)
    assert "the directory holds no data file" in line
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "a.jsonl", chats(1))
    (line,) = refused(tmp_path)
    assert f"give {tmp_path}/**/*.jsonl" in line
    assert load(tmp_path / "**" / "*.jsonl").reports[0].used == 1
    (tmp_path / "data" / "b.txt").write_text("text")
    (line,) = refused(tmp_path / "data")
    assert "files of several formats (1 .jsonl, 1 .txt)" in line


def test_a_directory_that_datasets_wrote(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    (line,) = refused(tmp_path)
    assert "type: huggingface" in line


def test_an_unreadable_file(tmp_path, monkeypatch):
    """The tests may run as root, whom no permission stops: the failing open stands in for it."""
    path = write_jsonl(tmp_path / "train.jsonl", chats(1))

    def fail(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", fail)
    (line,) = refused(path)
    assert line == f"{path}: cannot be read (Permission denied)."


def test_fixtures_stay_as_they_are():
    """Reading opens files for reading only."""
    before = {path: path.read_bytes() for path in FIXTURES.iterdir()}
    for path in before:
        if path.suffix != ".md":
            load(path)
    assert before == {path: path.read_bytes() for path in FIXTURES.iterdir()}


def test_a_full_disk(tmp_path, monkeypatch):
    """Rows are kept in a temporary file: /dev/full stands in for a full disk."""
    path = write_jsonl(tmp_path / "train.jsonl", chats(3000))
    monkeypatch.setattr(pa, "OSFile", lambda _, mode: REAL_FILE("/dev/full", mode))
    (line,) = refused(path)
    assert "the rows cannot be written here (No space left on device)" in line
    assert line.endswith("Set TMPDIR to a disk with more room.")


def test_rows_without_columns(tmp_path):
    path = write(tmp_path / "train.jsonl", b"{}", b"{}")
    assert refused(path) == ["data.sources[0]: the rows have no columns."]


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ([], "messages: empty conversation."),
        (["hello"], "messages[0]: wrong type (text; expected an object with a role)."),
    ],
)
def test_a_column_called_messages_is_judged_as_messages(value, what, tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [{"messages": value}])
    assert refused(path)[0] == f"{path}:1: {what}"


def test_spaces_after_the_commas_of_a_header(tmp_path):
    path = write(tmp_path / "qa.csv", b"question, answer", b"a,b")
    assert load(path).reports[0].detected.startswith("question/answer")


def test_a_number_among_texts(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [{"text": "one"}, {"text": 2}, {"text": "three"}])
    assert refused(path)[0] == f"{path}:2: text: wrong type (the number 2; expected text)."
