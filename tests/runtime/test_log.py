"""Where lines go."""

import io
import logging

import pytest
from rich.console import Console

from fasttrain.runtime import log


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(log, "_output", None)
    monkeypatch.delenv("RANK", raising=False)
    level = log.LOGGER.level
    yield
    log.LOGGER.handlers.clear()
    log.LOGGER.setLevel(level)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\nlines", "two↵lines"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\ttab\r", "\\ttab\\r"),
        ("right\u202eleft", "right\\u202eleft"),
        ("\ud800", "\\ud800"),
        ("½ é 漢 🙂", "½ é 漢 🙂"),
    ],
)
def test_characters_that_steer_a_terminal_are_shown_not_sent(text, shown):
    assert log.escape_controls(text) == shown


def test_lines_are_printed_whole_and_as_they_are(capsys):
    line = "a [bold]long[/bold] line :smile: " * 20
    log.output().print(line)
    assert capsys.readouterr().out == line + "\n"


def test_on_a_terminal_a_long_line_goes_on_under_its_column():
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=30)
    log.Output(console).print("label  one two three four five six seven", indent=7)
    assert console.file.getvalue() == "label  one two three four five\n       six seven\n"


def test_infos_are_lines_and_warnings_go_to_stderr(capsys):
    log.configure(level="info")
    log.configure(level="info")  # twice in a process, once on the screen
    logger = logging.getLogger("fasttrain.data")
    logger.debug("hidden")
    logger.info("read 3 rows")
    logger.warning("step %d\nfailed", 3)
    shown = capsys.readouterr()
    assert shown.out == "read 3 rows\n"
    assert shown.err == "fasttrain: warning: step 3↵failed\n"


def test_the_level_is_the_users(capsys):
    log.configure(level="error")
    logging.getLogger("fasttrain").warning("careful")
    assert capsys.readouterr().err == ""


def test_a_pipe_gets_plain_lines_and_a_terminal_one_that_is_redrawn():
    assert not log.Output(Console(file=io.StringIO())).redraws
    assert log.Output(Console(file=io.StringIO(), force_terminal=True)).redraws
    assert not log.Output(Console(file=io.StringIO(), force_terminal=True), style="plain").redraws
    assert log.Output(Console(file=io.StringIO()), style="rich").redraws


def test_the_redrawn_line_is_cut_to_the_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=40)
    output = log.Output(console)
    output.progress("step 1/10 · " + "x" * 100)
    drawn = console.file.getvalue()
    output.end_progress()
    assert drawn.endswith("step 1/10 · " + "x" * 27 + "…") and "\n" not in drawn


def test_without_colours_a_span_needs_another_mark():
    coloured = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    assert log.Output(coloured).has_colour
    uncoloured = Console(
        file=io.StringIO(), force_terminal=True, color_system="standard", no_color=True
    )
    assert not log.Output(uncoloured).has_colour
    assert not log.Output(Console(file=io.StringIO())).has_colour
