"""What every section of the config shares. Nothing here, or below, imports torch."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from fasttrain.config.numbers import human_float, human_int

MAX_INT = 2**31 - 1


class Section(BaseModel):
    """A frozen part of the config. Unknown keys are errors; a field's docstring is its help."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class ComponentSection(Section):
    """A section that chooses a component: `type` names it, the rest are the component's options."""

    type: str
    """Registered name of the component, or `module:Class` of your own."""


def _list_to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# Human numbers are read everywhere: `8k`, `1e6`, `2^20`; a bool is never a number.
Int = Annotated[int, BeforeValidator(human_int)]
PositiveInt = Annotated[int, BeforeValidator(human_int), Field(ge=1, le=MAX_INT)]
NonNegativeInt = Annotated[int, BeforeValidator(human_int), Field(ge=0, le=MAX_INT)]
Float = Annotated[float, BeforeValidator(human_float)]
PositiveFloat = Annotated[float, BeforeValidator(human_float), Field(gt=0)]
NonNegativeFloat = Annotated[float, BeforeValidator(human_float), Field(ge=0)]
Fraction = Annotated[float, BeforeValidator(human_float), Field(ge=0, le=1)]
# YAML writes lists; the frozen tree holds tuples.
Strings = Annotated[tuple[str, ...], BeforeValidator(_list_to_tuple)]
entries = BeforeValidator(_list_to_tuple)  # for a list of sections


def _strings(value: Any) -> Any:
    return (value,) if isinstance(value, str) else _list_to_tuple(value)


# One text, or several.
StringOrStrings = Annotated[
    tuple[str, ...], BeforeValidator(_strings, json_schema_input_type=str | tuple[str, ...])
]
# Paths are relative to the working directory; `~` is the home directory.
LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]
Floats2 = Annotated[tuple[Float, Float], BeforeValidator(_list_to_tuple)]
