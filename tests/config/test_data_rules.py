"""Data files that are missing, named twice, or not what their names say."""

import gzip

import pytest

from fasttrain.config.data_rules import peek

ROW = '{"prompt": "a", "completion": "b"}\n'
PARQUET = b"PAR1" + b"\0" * 20 + b"PAR1"


@pytest.fixture
def sources_problems(problems_of):
    def lines(sources, more=""):
        base = f"model: {{type: random}}\ntokenizer: trained\ndata:\n  sources: {sources}\n{more}"
        return problems_of(base=base)

    return lines


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "trian.jsonl",
            "data.sources[0].path: no such file (got 'trian.jsonl'). Did you mean 'train.jsonl'?",
        ),
        (
            "./dat/train.jsonl",
            "data.sources[0].path: no such file (got './dat/train.jsonl'). "
            "There is no directory './dat' either.",
        ),
        ("'*.parquet'", "data.sources[0].path: no file matches (got '*.parquet')."),
        (
            "empty",
            "data.sources[0].path: the directory holds no data file (got 'empty', expected files "
            "of .jsonl, .json, .parquet, .csv, .txt).",
        ),
    ],
)
def test_data_that_are_not_there(sources_problems, write, workspace, source, message):
    write("train.jsonl", ROW)
    (workspace / "empty").mkdir()
    assert sources_problems(f"[{source}]") == [f"sft.yaml:4: {message}"]


def test_the_same_file_twice(sources_problems, write, workspace):
    write("train.jsonl", ROW)
    (workspace / "link.jsonl").symlink_to("train.jsonl")
    assert sources_problems("[train.jsonl, link.jsonl]") == [
        "sft.yaml:4: data.sources[1].path: the file is named twice (got 'link.jsonl', first under "
        "data.sources[0].path). Keep one."
    ]
    assert sources_problems("[train.jsonl]", "  eval_sources: ['*n.jsonl']\n") == [
        "sft.yaml:5: data.eval_sources[0].path: held-out rows would be trained on: 'train.jsonl' "
        "stands under data.sources[0].path too. Use data.eval_split to hold out a part of it."
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: the file is empty."),
        ("a.jsonl", b'{"a": 1}\n', None),
        ("a.jsonl", b'\n\n{"a": 1}\n{', None),
        ("a.jsonl", b"\xef\xbb\xbf" + b'{"a": 1}\n', None),
        ("a.jsonl", b'{"a": }\n', "a.jsonl:1: invalid JSON at column 7 (Expecting value)."),
        (
            "a.jsonl",
            b"\n[1]\n",
            "a.jsonl:2: a JSON array, not one row per line. Rename the file to .json.",
        ),
        ("a.jsonl", b"3\n", "a.jsonl:1: not a JSON object (expected one row per line)."),
        (
            "a.jsonl",
            b"{\n",
            "a.jsonl:1: invalid JSON at column 2 (Expecting property name enclosed in double "
            "quotes). Every row stands on one line.",
        ),
        (
            "a.jsonl",
            b'{"a": 1}\n{"a": "\xe9"}\n',
            "a.jsonl:2:8: invalid UTF-8 (byte 0xe9). Save it as UTF-8.",
        ),
        (
            "a.csv",
            "a,b\n1,2\n".encode("utf-16"),
            "a.csv: UTF-16 text (expected UTF-8). Save it as UTF-8.",
        ),
        (
            "a.txt",
            b"PK\x03\x04rest",
            "a.txt: the content is a zip archive, not .txt. Give it its real suffix.",
        ),
        ("a.json", b"PAR1", "a.json: the content is Parquet, not .json. Give it its real suffix."),
        ("a.parquet", PARQUET, None),
        (
            "a.parquet",
            PARQUET[:-4],
            "a.parquet: the Parquet file is truncated: it does not end with PAR1. Fetch it again.",
        ),
        ("a.parquet", b"x", "a.parquet: no Parquet file: it does not begin with PAR1."),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n', mtime=0), None),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"a": }\n', mtime=0),
            "a.jsonl.gz:1: invalid JSON at column 7 (Expecting value).",
        ),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"a": 1}\n', mtime=0)[:-9],
            "a.jsonl.gz: the gzip file is truncated or damaged (Compressed file ended before the "
            "end-of-stream marker was reached).",
        ),
        (
            "a.jsonl.gz",
            b'{"a": 1}\n',
            "a.jsonl.gz: the gzip file is truncated or damaged (Not a gzipped file (b'{\"')).",
        ),
        ("a.other", b"\xff\x00", None),
        ("a.jsonl", b'{"a": "' + b"x" * (1 << 17), None),  # a row longer than the look
    ],
)
def test_a_look_into_a_file(write, name, content, message):
    found = peek(write(name, content))
    assert (str(found) if found else None) == message


def test_a_multibyte_character_at_the_end_of_the_look_is_no_mistake(write):
    assert peek(write("a.txt", b"a" * ((1 << 16) - 1) + "é".encode())) is None


def test_rows_that_may_be_dropped_are_no_problem(write, config_of):
    write("a.jsonl", "{broken\n" + ROW)
    base = "model: {type: random}\ntokenizer: trained\ndata: {sources: [a.jsonl], invalid: drop}\n"
    assert config_of(base=base).config.data.invalid == "drop"
