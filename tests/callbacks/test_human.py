"""Numbers as people read them."""

import pytest

from fasttrain.callbacks import human


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"), (940, "940"), (999.4, "999"), (999.6, "1.00k"), (1234, "1.23k"),
        (41_234, "41.2k"), (412_345, "412k"), (999_960, "1.00M"), (7_615_616_512, "7.62B"),
    ],
)  # fmt: skip
def test_counts(number, text):
    assert human.count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0s"), (9.94, "9.9s"), (9.96, "10s"), (59.4, "59s"), (185, "3m05s"),
        (3599.6, "1h00m"), (4320, "1h12m"), (183_600, "2d03h"),
    ],
)  # fmt: skip
def test_durations(seconds, text):
    assert human.duration(seconds) == text


def test_sizes_and_plurals():
    assert human.size(812 * 2**20) == "812 MiB"
    assert human.size(1_503_238_553) == "1.4 GiB"
    assert human.plural(1, "row") == "1 row" and human.plural(12_000, "row") == "12,000 rows"


def test_a_shortened_text_keeps_both_ends():
    assert human.shorten("short", 10) == "short"
    shortened = human.shorten("a" * 50 + "b" * 50, 30)
    assert shortened == "a" * 17 + " … " + "b" * 10 and len(shortened) == 30
