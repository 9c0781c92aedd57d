"""Numbers as people write them: `8k`, `1e6`, `2^20`, `4Ki`, `50%`. Exact decimal arithmetic."""

from __future__ import annotations

import re
from decimal import Decimal, localcontext
from typing import Any

from pydantic_core import PydanticCustomError

MAX_TEXT = 64  # characters of a number; longer ones are a mistake or an attack
MAX_INTEGER = 2**63 - 1
MAX_EXACT_FLOAT = 2**53  # whole floats beyond this stand for many integers

_SUFFIXES = {
    "k": 10**3,
    "m": 10**6,
    "b": 10**9,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
HUMAN_NUMBER = r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?\s*([kKmMgGtT]i|[kKmMbBgGtT]|%)?"
HUMAN_POWER = r"\d+\^\d+"
_NUMBER = re.compile(
    r"(?P<mantissa>[-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*"
    r"(?P<suffix>[kKmMgGtT]i|[kKmMbBgGtT]|%)?"
)
_POWER = re.compile(r"(?P<base>\d+)\^(?P<exponent>\d+)")


def human_int(value: Any) -> Any:
    """The whole number that `value` spells; what is none is handed on for pydantic to refuse.

    A float that is whole (`1e6` in YAML) counts; a bool never does.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        number = _decimal(value)
        if number is None or number != number.to_integral_value():
            return value
        value = int(number)
    elif isinstance(value, float) and value.is_integer() and abs(value) <= MAX_EXACT_FLOAT:
        value = int(value)
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise PydanticCustomError("number_range", "too large a number")
    return value


def human_float(value: Any) -> Any:
    """The number that `value` spells, correctly rounded: `"3e-4"` is exactly `float("3e-4")`."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        number = _decimal(value)
        return value if number is None else _finite(float(number))
    if isinstance(value, int):
        if value.bit_length() > 1023:
            raise PydanticCustomError("number_range", "too large a number")
        return float(value)
    return value


def _decimal(text: str) -> Decimal | None:
    """The value of a human number, exactly; None where the text is no number."""
    text = text.strip()
    if len(text) > MAX_TEXT:
        if text.lstrip("+-")[:1].isdigit():
            raise PydanticCustomError("number_range", "a number of more than 64 characters")
        return None
    power = _POWER.fullmatch(text)
    if power:
        base, exponent = int(power["base"]), int(power["exponent"])
        if exponent > 1023 or base > MAX_INTEGER:
            raise PydanticCustomError("number_range", "too large a number")
        return Decimal(base**exponent)
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    _refuse_leading_zero(match["mantissa"])
    return _scaled(match["mantissa"].replace("_", ""), match["suffix"])


def _refuse_leading_zero(mantissa: str) -> None:
    """`010` is 8 to some readers and 10 to others."""
    if re.match(r"[-+]?0\d", mantissa):
        raise PydanticCustomError("leading_zero", "a number with a leading zero")


def _scaled(mantissa: str, suffix: str | None) -> Decimal:
    exponent = re.search(r"[eE]([-+]?\d+)", mantissa)
    if exponent and abs(int(exponent[1])) > 400:
        raise PydanticCustomError("number_range", "not a finite number")
    with localcontext() as context:
        context.prec = 2 * MAX_TEXT  # enough for every product below to be exact
        number = Decimal(mantissa)
        if suffix == "%":
            return number / 100
        return number * _SUFFIXES[suffix.lower()] if suffix else number


def _finite(number: float) -> float:
    if number in (float("inf"), float("-inf")):
        raise PydanticCustomError("number_range", "not a finite number")
    return number
