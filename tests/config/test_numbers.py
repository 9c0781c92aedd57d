"""Numbers as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fasttrain.config.schema.base import Float, Int, Section


class Whole(Section):
    n: Int


class Real(Section):
    x: Float


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8k", 8000),
        ("8K", 8000),
        ("1.25K", 1250),
        ("4Ki", 4096),
        ("1.5Mi", 1572864),
        ("2M", 2_000_000),
        ("7b", 7_000_000_000),
        ("1T", 10**12),
        ("1e6", 1_000_000),
        ("2.5e3", 2500),
        ("2^20", 1048576),
        ("1_000", 1000),
        ("-3", -3),
        ("0", 0),
        (" 12 ", 12),
        ("200%", 2),
        (1e6, 1_000_000),
        (10.0, 10),
        (17, 17),
    ],
)
def test_whole_numbers(text, value):
    n = Whole(n=text).n
    assert n == value
    assert type(n) is int


@pytest.mark.parametrize(
    "value",
    [
        *(True, False, None, [1], "ten", "1.5", 2.5, "2.5e0", "50%", "", "k", "8kk", "12:30"),
        *("0x10", "1e-3", float("inf"), float("nan"), 1e300, "1,000", "--1", "8 000"),
    ],
)
def test_what_is_no_whole_number(value):
    with pytest.raises(ValidationError):
        Whole(n=value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("010", "a number with a leading zero"),
        ("-007", "a number with a leading zero"),
        ("9" * 65, "a number of more than 64 characters"),
        ("9" * 5000, "a number of more than 64 characters"),
        ("9" * 30, "too large a number"),
        ("2^2000", "too large a number"),
        ("1e999", "not a finite number"),
        ("1e99999999999", "not a finite number"),
        (10**30, "too large a number"),
    ],
)
def test_numbers_that_are_refused_say_why(text, message):
    with pytest.raises(ValidationError, match=message):
        Whole(n=text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("50%", 0.5),
        ("5%", 0.05),
        ("3e-4", 3e-4),
        ("1K", 1000.0),
        (".5", 0.5),
        (3, 3.0),
        (1e-5, 1e-5),
        *[("0.1", 0.1), ("0.5", 0.5), ("0", 0.0), ("2^10", 1024.0), ("12.5%", 0.125)],
    ],
)
def test_real_numbers(text, value):
    x = Real(x=text).x
    assert x == value
    assert type(x) is float


@pytest.mark.parametrize(
    "value", [True, "ten", "1e400", float("inf"), float("nan"), "nan", "inf", 10**400, "00.5", None]
)
def test_what_is_no_real_number(value):
    with pytest.raises(ValidationError):
        Real(x=value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_reads_back_exactly(number):
    assert Real(x=repr(number)).x == number


@given(st.integers(-(2**63) + 1, 2**63 - 1))
def test_every_integer_reads_back_exactly(number):
    assert Whole(n=str(number)).n == number


@given(st.decimals(0, 1000, places=3), st.sampled_from([("k", 3), ("M", 6), ("B", 9)]))
def test_suffixes_are_exact(number, suffix):
    name, power = suffix
    assert Real(x=f"{number}{name}").x == float(number.scaleb(power))
