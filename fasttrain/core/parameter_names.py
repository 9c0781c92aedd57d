"""Trained parameters by globs of their names, and what to say where a glob fits none."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import nn

from fasttrain.config.errors import Problem, UserError
from fasttrain.core.kernel_plan import WRAPPER, fits

NAMES_SHOWN = 3  # of those that resemble a glob


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name, a tied one once. UserError where nothing is trained."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise UserError(
            Problem(
                key="model",
                what="none of its parameters is trainable.",
                hint="Leave weights unfrozen, or add adapters: model.transforms: [{type: lora}].",
            )
        )
    return trained


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Train no parameter whose name fits a glob. UserError where a glob fits no trained one."""
    chosen = [
        parameter
        for pattern in patterns
        for parameter in fitting(model, pattern, key="model.freeze").values()
    ]
    for parameter in chosen:
        parameter.requires_grad_(False)


def fitting(model: nn.Module, pattern: str, *, key: str) -> dict[str, nn.Parameter]:
    """The trained parameters whose names fit a glob. UserError, told with the key, for none."""
    trained = trained_parameters(model)
    found = {name: p for name, p in trained.items() if fits(name, pattern)}
    if not found:
        frozen = any(fits(name, pattern) for name, _ in model.named_parameters())
        what = "fits only parameters that are frozen" if frozen else "fits no trained parameter"
        hint = f"Names that come near: {', '.join(_nearest(pattern, trained))}."
        raise UserError(Problem(key=key, what=f"'{pattern}' {what}.", hint=hint))
    return found


def _nearest(pattern: str, names: Iterable[str]) -> list[str]:
    """The names most like a glob; without a likeness the first ones."""
    shown = [name.removeprefix(WRAPPER) for name in names]
    plain = pattern.replace("*", "")
    return difflib.get_close_matches(plain, shown, NAMES_SHOWN, 0.4) or shown[:NAMES_SHOWN]
