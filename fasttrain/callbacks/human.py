"""Numbers as people read them."""

from __future__ import annotations

import math


def count(number: float) -> str:
    """Three digits and a magnitude: 940, 41.2k, 1.54M, 7.62B."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999,950 would round to 1000k.
        if abs(number) >= size * 0.9995:
            return f"{_three_digits(number / size)}{suffix}"
    return f"{number:.0f}"


def _three_digits(number: float) -> str:
    decimals = 2 - max(0, int(math.log10(max(abs(number), 1.0))))
    return f"{number:.{max(decimals, 0)}f}"


def plural(number: int, noun: str) -> str:
    """`1 row`, `12,000 rows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def duration(seconds: float) -> str:
    """`0.4s`, `59s`, `3m05s`, `1h12m`, `2d03h`."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    for unit, size, below, smaller in (("d", 86400, 3600, "h"), ("h", 3600, 60, "m")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // below:02d}{smaller}"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def size(number: int) -> str:
    """Bytes in binary units: 812 MiB, 1.4 GiB."""
    if number < 1024**3:
        return f"{number / 1024**2:.0f} MiB"
    return f"{number / 1024**3:.1f} GiB"


def shorten(text: str, width: int) -> str:
    """At most `width` characters: the head and a shorter tail around an ellipsis."""
    if len(text) <= width:
        return text
    tail = width // 3
    return f"{text[: width - tail - 3]} … {text[len(text) - tail :]}"
