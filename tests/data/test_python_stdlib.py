"""The standard library as training text: real, clean, deterministic, and never imported."""

import subprocess
import sys
import textwrap
from collections import Counter

import pytest
from source_rows import load, turns

from fasttrain.config.errors import UserError
from fasttrain.config.schema.data import PythonStdlibSourceConfig
from fasttrain.data.sources.python_stdlib import (
    MAX_ANSWER,
    MIN_ANSWER,
    PythonStdlibSource,
    stdlib_pairs,
)


@pytest.fixture(scope="module")
def pairs():
    return PythonStdlibSource(PythonStdlibSourceConfig()).load()


def library(root, **files):
    """A made-up standard library; pairs of it as (question, answer)."""
    for name, text in files.items():
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return [(pair.prompt, pair.response) for pair in stdlib_pairs(root)]


def test_size_and_kinds(pairs):
    """Enough to train on, short enough for a small model; tkinter and others may be missing."""
    assert 5_000 < len(pairs) < 15_000
    kinds = Counter(prompt.split("`")[0] for prompt in pairs["prompt"])
    assert set(kinds) == {
        "What does ",
        "How do I call ",
        "Which function of ",
        "What is the class ",
        "What is the module ",
        "What is the attribute ",
    }
    assert max(map(len, pairs["prompt"])) < 500
    assert max(map(len, pairs["response"])) <= MAX_ANSWER
    assert min(map(len, pairs["response"])) > 3
    assert len(set(pairs["group"])) > 100


def test_no_question_is_asked_twice(pairs):
    assert len(set(pairs["prompt"])) == len(pairs)


def test_known_answers(pairs):
    answers = dict(zip(pairs["prompt"], pairs["response"], strict=True))
    asked = "What does `shutil.copyfile(src, dst, *, follow_symlinks=True)` do?"
    assert answers[asked] == "Copy data from src to dst in the most efficient way possible."
    assert answers["How do I call `os.path.join`?"] == "`os.path.join(a, *p)`"
    asked = "What is the class `collections.Counter(iterable=None, /, **kwds)`?"
    assert answers[asked].startswith("Dict subclass for counting hashable items.")


def test_groups_are_top_level_modules(pairs):
    by_module = {
        prompt.split("`")[1].partition(".")[0].partition("(")[0]: group
        for prompt, group in zip(pairs["prompt"], pairs["group"], strict=True)
    }
    assert all(name == group for name, group in by_module.items())
    assert not {"test", "idlelib", "lib2to3", "site-packages"} & set(by_module.values())


def test_modules_are_held_out_whole(pairs, monkeypatch):
    monkeypatch.setattr(PythonStdlibSource, "load", lambda self: pairs)
    rows = load(PythonStdlibSourceConfig(), eval_split=0.1)
    train, held = set(rows.train["group"]), set(rows.evaluation["group"])
    assert not train & held and len(held) > 3
    assert 0.08 < len(rows.evaluation) / len(pairs) < 0.12
    assert [role for role, _ in turns(rows.train[0])] == ["user", "assistant"]
    (report,) = rows.reports
    assert report.name == "python_stdlib" and report.detected.startswith("prompt/response")
    assert rows.train[0]["origin"].count(":") == 1


def test_two_processes_make_the_same_rows(pairs):
    """Nothing depends on hash seeds; nothing of the library is imported for it."""
    code = """
        import sys
        from fasttrain.config.schema.data import PythonStdlibSourceConfig
        from fasttrain.data.sources.python_stdlib import PythonStdlibSource
        before = set(sys.modules)
        rows = PythonStdlibSource(PythonStdlibSourceConfig()).load()
        assert not {"turtle", "tkinter", "antigravity", "this"} & set(sys.modules)
        assert not {name for name in set(sys.modules) - before if "." not in name}
        print(rows._fingerprint)
    """
    shown = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "12345", "PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    assert shown.stdout.strip() == pairs._fingerprint
    assert shown.stderr == ""


def test_what_is_asked_about_one_module(tmp_path):
    got = library(
        tmp_path,
        textwrap='''
            """Text wrapping and filling."""

            def wrap(text: str, width: int = 70, **kwargs) -> list:
                """Wrap a single paragraph of text.

                More is said here.
                """

            class Wrapper:
                """An object that
                wraps text."""

                def __init__(self, width=70): ...

                def fill(self, text):
                    """Reformat the text in full."""

                @property
                def width(self):
                    """The width of a line."""

                @width.setter
                def width(self, value):
                    """Set the width of a line."""

                @staticmethod
                def munge(a, b=()):
                    """Change white space of all kinds."""

                def _hidden(self):
                    """Nobody should call this."""

            def undocumented(a): ...
        ''',
    )
    assert got == [
        ("What is the module `textwrap` for?", "Text wrapping and filling."),
        (
            "What does `textwrap.wrap(text, width=70, **kwargs)` do?",
            "Wrap a single paragraph of text.",
        ),
        ("How do I call `textwrap.wrap`?", "`textwrap.wrap(text, width=70, **kwargs)`"),
        (
            "Which function of `textwrap` fits this: Wrap a single paragraph of text?",
            "`textwrap.wrap(text, width=70, **kwargs)`",
        ),
        ("What is the class `textwrap.Wrapper(width=70)`?", "An object that wraps text."),
        ("What does `textwrap.Wrapper.fill(text)` do?", "Reformat the text in full."),
        ("How do I call `textwrap.Wrapper.fill`?", "`textwrap.Wrapper.fill(text)`"),
        ("What is the attribute `textwrap.Wrapper.width`?", "The width of a line."),
        (
            "What does `textwrap.Wrapper.munge(a, b=())` do?",
            "Change white space of all kinds.",
        ),
        ("How do I call `textwrap.Wrapper.munge`?", "`textwrap.Wrapper.munge(a, b=())`"),
    ]


def test_docstrings_that_teach_nothing_are_left_out(tmp_path):
    long = "Many words are said here. " * 30
    got = library(
        tmp_path,
        ast=f'''
            def short(): "Does it."
            def listing(): "The following are possible:"
            def doctest(): ">>> doctest(1) gives two"
            def endless(): "{"word " * 100}"
            def repeated(): "This text is said in two places."
            def again(): "This text is said in two places."
            def long(): "{long}"
            def signed():
                """signed(a, b) -> int

                Return the sum of both."""
        ''',
    )
    answers = {question.split("`")[1]: answer for question, answer in got if "does" in question}
    assert list(answers) == ["ast.repeated()", "ast.long()", "ast.signed()"]
    assert answers["ast.signed()"] == "Return the sum of both."
    assert MIN_ANSWER < len(answers["ast.long()"]) <= MAX_ANSWER
    assert answers["ast.long()"].endswith("here.") and long.startswith(answers["ast.long()"])


def test_only_public_modules_of_the_library_count(tmp_path):
    text = '"""The text of {}, which is long enough."""'
    names = "json/__init__ json/decoder _pydecimal _strptime posixpath ntpath test/support "
    names += "unittest/test/case my_own site-packages/json"
    got = library(tmp_path, **{name: text.format(name) for name in names.split()})
    asked = [question.split("`")[1] for question, _ in got]
    assert asked == ["decimal", "json", "json.decoder", "os.path"]


def test_a_python_without_sources_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(
        UserError, match=r"no source files .*Give a file: data.sources=\[my.jsonl\]"
    ):
        PythonStdlibSource(PythonStdlibSourceConfig()).load()
