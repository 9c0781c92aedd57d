"""Chats of a realistic length profile, cut from the running Python's standard library.

Nothing is downloaded and nothing is drawn but from a seed: the same Python gives the same rows.
A user shows a piece of a module, the assistant goes on with the next piece.
"""

from __future__ import annotations

import math
import random
import sysconfig
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

# (quantile, tokens): the shape of public chat data, many short rows and a long tail.
LENGTH_PROFILE = ((0.0, 24), (0.1, 52), (0.5, 136), (0.9, 440), (0.99, 1206), (1.0, 1544))
TOKENS_PER_MESSAGE = 2  # the role's token and the end's
SHORTEST_PIECE = 4
# Tests, tables of characters, and what pip put there.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings"}

# Gives each token's (start, end) in the text.
Offsets = Callable[[str], list[tuple[int, int]]]


def stdlib_modules() -> list[tuple[str, str]]:
    """(name, source) of the standard library's modules, in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED.isdisjoint(parts):
            found.append((".".join(parts), path.read_text(encoding="utf-8", errors="replace")))
    return found


def length_at(quantile: float, scale: float) -> int:
    """Tokens of the chat at a quantile of the profile; straight lines in the logarithm."""
    for (q0, n0), (q1, n1) in pairwise(LENGTH_PROFILE):
        if quantile <= q1:
            share = (quantile - q0) / (q1 - q0)
            return round(scale * math.exp(math.log(n0) + share * math.log(n1 / n0)))
    raise ValueError(f"quantile {quantile} is not in [0, 1]")


def make_chats(
    count: int, modules: list[tuple[str, str]], offsets: Offsets, *, scale: float, seed: int
) -> Iterator[list[dict[str, str]]]:
    """`count` chats whose lengths follow the profile exactly, in a seeded order."""
    rng = random.Random(seed)
    lengths = [length_at((i + 0.5) / count, scale) for i in range(count)]
    rng.shuffle(lengths)
    for length in lengths:
        yield _chat(length, rng, modules, offsets)


def _chat(
    length: int, rng: random.Random, modules: list[tuple[str, str]], offsets: Offsets
) -> list[dict[str, str]]:
    """One to three exchanges, `length` tokens in all; about half of them are the assistant's."""
    exchanges = min(rng.choice((1, 1, 2, 3)), max(1, length // 48))
    messages = 2 * exchanges
    pieces = messages * SHORTEST_PIECE
    budget = max(length - messages * TOKENS_PER_MESSAGE, pieces)
    while True:
        _, source = modules[rng.randrange(len(modules))]
        # Eight characters a token is more than any passage needs.
        start = source.find("\n", rng.randrange(len(source) + 1)) + 1
        text = source[start : start + 8 * budget].lstrip("\n")
        spans = offsets(text)[:budget]
        if len(spans) == budget:
            break
    cuts = _cuts(budget, messages, rng)
    contents = [text[spans[a][0] : spans[b - 1][1]] for a, b in pairwise(cuts)]
    roles = ("user", "assistant") * exchanges
    return [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=True)
    ]


def _cuts(tokens: int, pieces: int, rng: random.Random) -> list[int]:
    """Where `tokens` are cut into that many pieces, none shorter than SHORTEST_PIECE."""
    weights = [rng.uniform(0.5, 1.5) for _ in range(pieces)]
    spare = tokens - pieces * SHORTEST_PIECE
    cuts, passed = [0], 0.0
    for number, weight in enumerate(weights, start=1):
        passed += weight
        cuts.append(number * SHORTEST_PIECE + round(spare * passed / sum(weights)))
    return cuts
