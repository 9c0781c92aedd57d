"""Optimizers that train at other weights than those the model is meant to be used with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def averages(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it has the modes of a schedule-free optimizer: eval() shows its average."""
    return callable(getattr(optimizer, "eval", None)) and callable(
        getattr(optimizer, "train", None)
    )


@contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the parameters are the optimizer's average; afterwards they have their bits again.

    Its train() computes the weights of training from the average, which rounds: so they are kept
    aside, a second copy of the trained parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
