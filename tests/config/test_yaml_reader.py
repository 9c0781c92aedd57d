"""YAML as a config reads it: YAML 1.2 scalars, places, and every file that is refused."""

import os

import pytest

from fasttrain.config.tree import Origin, find, plain
from fasttrain.config.yaml_reader import parse


def tree_of(text):
    problems = []
    node = parse(text, lambda line, column: Origin("file", "f", line, column), problems)
    assert problems == []
    return node


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("1.", 1.0),
        (".5", 0.5),
        ("-2", -2),
        ("+2", 2),
        ("0", 0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("NO", "NO"),
        ("y", "y"),
        ("010", "010"),
        ("0o10", "0o10"),
        ("0x1f", "0x1f"),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("2026-11-23", "2026-11-23"),
        ('"1"', "1"),
        ("'true'", "true"),
        ("8k", "8k"),
        (".inf", float("inf")),
        ("-.inf", float("-inf")),
        ("é", "é"),
    ],
)
def test_scalars_of_yaml_1_2(text, value):
    found = plain(tree_of(f"a: {text}\n"))["a"]
    assert found == value
    assert type(found) is type(value)


def test_every_key_and_item_knows_its_place():
    tree = tree_of("a: 1\nb:\n  - x\n  - {c: 2,\n     d: 3}\n")
    places = {
        path: (node.origin.line, node.origin.column)
        for path in [("a",), ("b",), ("b", 0), ("b", 1), ("b", 1, "c"), ("b", 1, "d")]
        if (node := find(tree, path))
    }
    assert places == {
        ("a",): (1, 1),
        ("b",): (2, 1),
        ("b", 0): (3, 5),
        ("b", 1): (4, 5),
        ("b", 1, "c"): (4, 6),
        ("b", 1, "d"): (5, 6),
    }


def test_anchors_are_unfolded_into_copies():
    tree = tree_of("a: &x {n: 1}\nb: *x\nc: [*x]\n")
    assert plain(tree) == {"a": {"n": 1}, "b": {"n": 1}, "c": [{"n": 1}]}
    assert find(tree, ("b",)).origin.line == 2
    find(tree, ("b", "n")).value = 2
    assert plain(tree)["a"] == {"n": 1}


BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
DEEP_ALIASES = f"a0: &a0 {'[' * 60}{']' * 60}\na1: &a1 {'[' * 10}*a0{']' * 10}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "sft.yaml: the config is empty."),
        ("# only a comment\n", "sft.yaml: the config is empty."),
        ("---\n", "sft.yaml: the config is empty."),
        ("- a\n- b\n", "sft.yaml:1: the config is a list (expected `key: value` lines)."),
        ("\nhello\n", "sft.yaml:2: the config is a single value (expected `key: value` lines)."),
        (
            "model:\n\tname: x\n",
            "sft.yaml:2: not valid YAML: a tab where YAML wants spaces (column 1).",
        ),
        (
            "data: {a: 1\nmodel: x\n",
            "sft.yaml:2: not valid YAML: expected ',' or '}', but got ':' (column 6).",
        ),
        (
            "model: a: b\n",
            "sft.yaml:1: not valid YAML: mapping values are not allowed here (column 9).",
        ),
        ("a: 1\n---\nb: 2\n", "sft.yaml:2: a second document ('---'). A config is one document."),
        (
            "model: x\nseed: 1\nmodel: y\n",
            "sft.yaml:3: model: given twice (first in line 1). Keep one.",
        ),
        (
            "optimizer:\n  lr: 1\n  lr: 2\n",
            "sft.yaml:3: optimizer.lr: given twice (first in line 2). Keep one.",
        ),
        ("1: x\n", "sft.yaml:1: a key that is not text (got 1). Quote it."),
        ("true: x\n", "sft.yaml:1: a key that is not text (got True). Quote it."),
        ("? [a]\n: x\n", "sft.yaml:1: a key that is not text (got a list or mapping). Quote it."),
        (
            "model: !!python/object:os.system x\n",
            "sft.yaml:1: model: the tag '!!python/object:os.system' is not read. Remove it.",
        ),
        ("seed: !!int 3\n", "sft.yaml:1: seed: the tag '!!int' is not read. Remove it."),
        (
            "a: &x {b: 1}\nmodel:\n  <<: *x\n",
            "sft.yaml:3: model: the merge key '<<' is not read. "
            "Write the keys out, or use `extends`.",
        ),
        ("model: *x\n", "sft.yaml:1: no anchor '&x' stands before the alias '*x'."),
        ("model: &x {b: *x}\n", "sft.yaml:1: the anchor '&x' contains itself."),
        (BOMB, "sft.yaml:5: more than 20000 values, aliases unfolded."),
        (DEEP_ALIASES, "sft.yaml:2: nested deeper than 64 levels."),
        ("a: " + "[" * 3000, "sft.yaml:1: nested deeper than 64 levels."),
        ("a: " + "{a: " * 3000, "sft.yaml:1: nested deeper than 64 levels."),
        ("? " * 3000 + "a", "sft.yaml:1: nested deeper than 64 levels."),
        (
            b"\xef\xbb\xbfseed: 1\n",
            "sft.yaml: starts with a byte order mark (offset 0). Save it as UTF-8 without BOM.",
        ),
        (
            "seed: 1\n".encode("utf-16"),
            "sft.yaml: is UTF-16 (a byte order mark at offset 0). Save it as UTF-8.",
        ),
        (b"seed: 1\nname: a\0b\n", "sft.yaml:2: a NUL byte at offset 15."),
        (
            b"seed: 1\nname: caf\xe9\n",
            "sft.yaml:2: byte 0xe9 at offset 17 is not UTF-8. Save it as UTF-8.",
        ),
        (b"seed: 1\nname: a\x07b\n", "sft.yaml:2: the control character U+0007 is not YAML."),
        (
            b"#" * (1 << 20) + b"#",
            "sft.yaml: is too large for a config (got 1048577 bytes, at most 1 MiB).",
        ),
    ],
)
def test_what_cannot_be_read_is_one_line(problems_of, content, message):
    data = content if isinstance(content, bytes) else content.encode()
    assert message in problems_of(data)


def test_a_file_that_cannot_be_read_at_all_is_the_only_problem(problems_of):
    assert problems_of(b"model:\n\tx\n") == [
        "sft.yaml:2: not valid YAML: a tab where YAML wants spaces (column 1)."
    ]


def test_what_is_no_regular_file(workspace):
    from fasttrain.config.load import load

    os.mkfifo("pipe.yaml")
    (workspace / "directory.yaml").mkdir()
    for path, message in {
        "pipe.yaml": "pipe.yaml: is no regular file.",
        "directory.yaml": "directory.yaml: is a directory (expected a YAML file).",
        "absent.yaml": "absent.yaml: no such file.",
        "https://example.org/sft.yaml": "https://example.org/sft.yaml: a config is read from a "
        "local file, never from an address.",
        "/dev/zero": "/dev/zero: is no regular file.",
    }.items():
        with pytest.raises(ValueError) as caught:
            load(path)
        assert str(caught.value) == message
