"""What a checkpoint keeps of a run beside tensors, as JSON.

JSON holds a float as the shortest text that reads back as the same bits, so nothing is rounded.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from fasttrain.config.errors import Problem, UserError

if TYPE_CHECKING:
    from fasttrain.core.run import Run

FORMAT = 1

# Fields of Run that a resumed run continues with, as they are.
_COUNTERS = (
    "step",
    "epoch",
    "step_in_epoch",
    "tokens",
    "supervised_tokens",
    "last_learning_rate",
    "loss",
    "eval_loss",
    "eval_step",
    "best_eval_loss",
    "best_step",
)


def state_dict(run: Run) -> dict[str, Any]:
    """The run's state as JSON-able values. TypeError names a part that JSON can't hold."""
    state = {
        "format": FORMAT,
        "run_id": run.run_id,
        "data": run.data.fingerprint,
        "counters": {name: getattr(run, name) for name in _COUNTERS},
        "interval": asdict(run.interval),
        "finished": run.finished,
        "stop_reason": run.stop_reason if run.stop_finishes else None,
        "schedule": {
            "state": _plain(run.scheduler.state_dict()),
            "learning_rates": [float(group["lr"]) for group in run.optimizer.param_groups],
        },
        "optimizer": run.engine.optimizer_numbers(),
        "callbacks": [
            {"name": name, "state": callback.state_dict()}
            for name, callback in _named_callbacks(run)
        ],
    }
    _refuse_what_json_changes(state, "state")
    return state


def load_state_dict(run: Run, state: dict[str, Any]) -> None:
    """Put `state` into a run whose blocks are built. UserError for a format of another version.

    A run of another id that goes on from here keeps its own id, and isn't told to stop because the
    former one reached its aim.
    """
    if state.get("format") != FORMAT:
        raise UserError(
            Problem(
                where="state.json",
                what=f"the run's state has format {state.get('format')}, this version of fasttrain "
                f"reads {FORMAT}.",
                hint="Go on with the version that wrote it.",
            )
        )
    if state["run_id"] == run.run_id and state["data"] != run.data.fingerprint:
        raise UserError(
            Problem(
                key="data.sources",
                what="the training documents are not those this run began with, so that its place "
                "in them means nothing.",
                hint="Put the data back, or start anew with another output_dir.",
            )
        )
    for name in _COUNTERS:
        setattr(run, name, state["counters"][name])
    # A field that came later is absent from older states, and at its default is what it was then.
    run.interval = replace(run.interval, **state["interval"])
    _load_schedule(run, state["schedule"])
    if "optimizer" in state:
        _load_optimizer(run, state["optimizer"])
    saved = {entry["name"]: entry["state"] for entry in state["callbacks"]}
    for name, callback in _named_callbacks(run):
        if name in saved:
            callback.load_state_dict(saved[name])
    if state["run_id"] == run.run_id and state["stop_reason"] is not None:
        run.stop(state["stop_reason"], finished=True)


def _load_optimizer(run: Run, saved: dict[str, Any]) -> None:
    try:
        run.engine.load_optimizer_numbers(saved)
    except ValueError as error:
        hint = "Go on with the optimizer's settings, and the frozen parameters, of before."
        raise UserError(Problem(where="state.json", what=f"{error}.", hint=hint)) from error


def _load_schedule(run: Run, saved: dict[str, Any]) -> None:
    """torch's schedules leave the optimizer's rate of the coming step to the optimizer's state."""
    scheduler, groups = run.scheduler, run.optimizer.param_groups
    peaks = scheduler.base_lrs
    scheduler.load_state_dict(saved["state"])
    rates = saved["learning_rates"]
    if isinstance(scheduler, LambdaLR):
        # A formula of the step, so it is computed anew: the same bits under the same config, and a
        # peak rate or a horizon that was changed on purpose counts at once.
        scheduler.base_lrs = peaks
        rates = [
            peak * factor(scheduler.last_epoch)
            for peak, factor in zip(peaks, scheduler.lr_lambdas, strict=True)
        ]
        scheduler._last_lr = rates
    if len(rates) != len(groups):
        what = f"the schedule was saved for {len(rates)} parameter groups, the run has "
        hint = "Go on with the optimizer's rules and the frozen parameters of before."
        raise UserError(Problem(where="state.json", what=f"{what}{len(groups)}.", hint=hint))
    for group, rate in zip(groups, rates, strict=True):
        if isinstance(group["lr"], float):
            group["lr"] = rate
        else:
            group["lr"].fill_(rate)


def _plain(value: Any) -> Any:
    """Learning rates that an optimizer keeps as tensors, as numbers."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value.item() if isinstance(value, Tensor) else value


def _named_callbacks(run: Run) -> list[tuple[str, Any]]:
    """Callbacks by class name; where a class occurs again, with its number: `Samples 2`."""
    seen: Counter[str] = Counter()
    named = []
    for callback in run.hooks.callbacks:
        name = type(callback).__qualname__
        seen[name] += 1
        named.append((name if seen[name] == 1 else f"{name} {seen[name]}", callback))
    return named


def _refuse_what_json_changes(value: Any, place: str) -> None:
    """A tuple, an integer key or a tensor would come back as something else, or not at all."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_what_json_changes(item, f"{place}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"a checkpoint can't keep {place}: its key {key!r} is no string")
            _refuse_what_json_changes(item, f"{place}.{key}")
    elif not isinstance(value, (str, int, float, type(None))):
        raise TypeError(f"a checkpoint can't keep {place}: {type(value).__name__} is no JSON")
