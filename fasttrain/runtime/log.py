"""What the user reads goes through one object, so that lines and the redrawn one keep their order.

Only rank 0 speaks. Messages of the logger "fasttrain" come out here too: info as plain lines,
warnings on stderr.
"""

from __future__ import annotations

import logging
import os
import sys
import unicodedata
from typing import Literal

from rich.console import Console
from rich.live import Live
from rich.text import Text

Style = Literal["auto", "rich", "plain"]

LOGGER = logging.getLogger("fasttrain")


def escape_controls(text: str) -> str:
    """`text` without characters that move the cursor or hide others; a line break becomes ↵."""
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character == "\n":
        return "↵"
    if unicodedata.category(character).startswith("C"):
        return character.encode("unicode_escape", "surrogatepass").decode("ascii")
    return character


class Output:
    """Printed lines, and below them one line that is redrawn while training."""

    def __init__(
        self, console: Console | None = None, *, style: Style = "auto", rank: int | None = None
    ) -> None:
        # Without a file of its own a Console looks sys.stdout up at each write.
        self.console = console or Console(force_terminal=True if style == "rich" else None)
        self.speaks = (int(os.environ.get("RANK", "0")) if rank is None else rank) == 0
        self._style = style
        self._live: Live | None = None

    @property
    def redraws(self) -> bool:
        """Whether progress is one redrawn line; otherwise each logged step is a line of its own."""
        if self._style != "auto":
            return self._style == "rich"
        return self.console.is_terminal and not self.console.is_dumb_terminal

    @property
    def has_colour(self) -> bool:
        """Whether colours are seen, so that nothing else need mark a span."""
        console = self.console
        return console.is_terminal and console.color_system is not None and not console.no_color

    def print(self, *lines: str | Text, indent: int = 0) -> None:
        """Print lines above the redrawn one. On a terminal a line that is too long goes on below,
        under its column `indent`; elsewhere a line is never broken."""
        if not self.speaks:
            return
        for line in lines:
            for part in self._broken(line, indent):
                self.console.print(part, soft_wrap=True, markup=False, highlight=False, emoji=False)

    def _broken(self, line: str | Text, indent: int) -> list[Text]:
        text = Text(line) if isinstance(line, str) else line
        if not indent or not self.console.is_terminal or text.cell_len <= self.console.width:
            return [text]
        width = max(self.console.width - indent, 20)
        first, *others = text[indent:].wrap(self.console, width)
        return [text[:indent] + first, *(Text(" " * indent) + other for other in others)]

    def progress(self, line: str) -> None:
        """Redraw the progress line, cut to the terminal's width."""
        if not self.speaks:
            return
        if self._live is None:
            # No refresh thread: it would hold locks while data workers fork.
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
            # Rich hides the cursor; a run that is killed could never show it again.
            self.console.show_cursor(True)
        self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)

    def end_progress(self) -> None:
        """Take the progress line away."""
        if self._live is not None:
            self._live.stop()
            self._live = None


_output: Output | None = None


def output() -> Output:
    """This process's output."""
    global _output
    if _output is None:
        _output = Output()
    return _output


def configure(*, style: Style = "auto", level: str = "info") -> Output:
    """Choose the style and the least severe message that is shown. May be called again."""
    global _output
    if _output is not None:
        _output.end_progress()
    _output = Output(style=style)
    LOGGER.setLevel(level.upper())
    if not any(isinstance(handler, _LineHandler) for handler in LOGGER.handlers):
        LOGGER.addHandler(_LineHandler())
    return _output


class _LineHandler(logging.Handler):
    """Puts log messages among the other lines."""

    def emit(self, record: logging.LogRecord) -> None:
        message = escape_controls(record.getMessage())
        if record.levelno < logging.WARNING:
            output().print(message)
        elif output().speaks:
            # While a line is redrawn, Rich stands behind sys.stderr and keeps the order.
            print(f"fasttrain: {record.levelname.lower()}: {message}", file=sys.stderr, flush=True)
