"""Warm-up, the same for every schedule."""

from __future__ import annotations

from fasttrain.config.errors import Problem, UserError
from fasttrain.config.schema.scheduler import SchedulerSection


def warmup_steps(config: SchedulerSection, total_steps: int) -> int:
    """Steps of warm-up, from `warmup_steps` or `warmup_ratio`; 0 where neither is given.

    UserError where both are given, or where the warm-up doesn't end before the last step.
    """
    if config.warmup_steps is not None and config.warmup_ratio is not None:
        raise UserError(
            Problem(
                key="scheduler",
                what="warmup_steps and warmup_ratio exclude each other.",
                hint="Give one of them.",
            )
        )
    if config.warmup_ratio is None:
        key, steps = "scheduler.warmup_steps", config.warmup_steps or 0
    else:
        key, steps = "scheduler.warmup_ratio", round(config.warmup_ratio * total_steps)
    if steps >= total_steps and steps > 0:
        raise UserError(
            Problem(
                key=key,
                what=f"{steps} steps of warm-up don't fit into a run of {total_steps} steps.",
                hint="Shorten the warm-up or train longer.",
            )
        )
    return steps


def warmup_factor(step: int, warmup: int) -> float:
    """The straight line from 0 to 1 that would be 0 just before step 0 and is 1 at step warmup − 1.

    So step 0 trains at 1 / warmup, not at 0, and each warm-up step learns. 1 after the warm-up.
    """
    return min((step + 1) / warmup, 1.0) if warmup else 1.0


def decay_progress(step: int, first: int, last: int) -> float:
    """Share of the way from step `first` (0) to step `last` (1), both included; held outside them.

    `first` is the last step at the peak, `last` the one that the run no longer trains: like the
    first step of a warm-up, its last step still learns. Where `last` isn't after `first`: 0.
    """
    if last <= first:
        return 0.0
    return min(max((step - first) / (last - first), 0.0), 1.0)
