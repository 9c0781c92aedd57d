"""Plain text, cut into passages between paragraphs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fasttrain.data.sources.rows import RawRow
from fasttrain.data.sources.text_lines import TextLines, shown

# About 500 tokens of English: short enough that nothing is lost to max_length, and that there are
# passages to hold out; long enough to hold a context. Packing puts several into one row of a batch.
PASSAGE_CHARACTERS = 2048


NOTE = f"cut between paragraphs into passages of at most {PASSAGE_CHARACTERS:,} characters"


def read_txt(path: Path) -> Iterator[RawRow]:
    """Passages of whole paragraphs, each at most PASSAGE_CHARACTERS long where lines allow it.

    Paragraphs end at blank lines. One that is longer than a passage is cut between its lines; a
    single longer line stays whole. In order, the passages are the whole text but for blank lines.
    """
    lines = TextLines(path)
    name = shown(path)
    passage: list[tuple[int, str]] = []  # line numbers and lines
    size, last_blank = 0, 0
    for text in lines:
        trouble = lines.take_trouble()
        if trouble is not None:
            yield trouble
            continue
        line = text.rstrip("\r\n") + "\n"
        while passage and size + len(line) > PASSAGE_CHARACTERS:
            cut = last_blank or len(passage)
            yield from _row(passage[:cut], name)
            passage = passage[cut:]
            size, last_blank = sum(len(rest) for _, rest in passage), 0
        passage.append((lines.number, line))
        size += len(line)
        if line.isspace():
            last_blank = len(passage)
    yield from _row(passage, name)


def _row(passage: list[tuple[int, str]], name: str) -> Iterator[RawRow]:
    text = "".join(line for _, line in passage)
    if text.strip():
        first = next(number for number, line in passage if line.strip())
        yield RawRow(f"{name}:{first}", {"text": text.strip("\n")})
