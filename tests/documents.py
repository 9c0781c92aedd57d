"""The project's pages, cut into the parts that a test can check."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
OTHERS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
OTHERS += [ROOT / name / "README.md" for name in ("kernels", "bench")]
PAGES = [*OTHERS, *DOCS]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OWN_CODE = "# my_code.py"  # opens a sample that a config imports; the next block is that config


@dataclass(frozen=True)
class Block:
    """A fenced block. `language` is "" where the fence names none."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a page in `languages`, or all of them."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2])
        for match in _FENCE.finditer(text)
    ]
    return [block for block in found if not languages or block.language in languages]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def own_code(page: Path) -> list[tuple[Block, Block]]:
    """Samples of components of one's own, each with the config that uses it."""
    both = blocks(page, "python", "yaml")
    return [(code, config) for code, config in pairwise(both) if code.text.startswith(OWN_CODE)]


def commands(page: Path) -> list[str]:
    """Every line of a block, and every piece of inline code, that starts `fasttrain` or `make`."""
    lines = [line.strip() for block in blocks(page, "") for line in block.text.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", prose(page))
    lines = [
        line.removeprefix(".venv/bin/").removeprefix("CUDA_VISIBLE_DEVICES=") for line in lines
    ]
    lines = [re.sub(r"^\d+ ", "", line) for line in lines]
    return [line for line in lines if re.match(r"(fasttrain|make) [a-z-]", line)]
