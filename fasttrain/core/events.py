"""The callback layer: observers look, wrappers change. Every hook, in the order of a run:

    create callbacks                                on_run_start
    load_source, for each source                    (wrapped)
    create_tokenizer                                (wrapped)  on_tokenizer_created
    tokenize                                        (wrapped)  on_data_ready
    create_model                                    (wrapped)
        load, lora
        select_kernels                              (wrapped)  on_kernels_selected
        kernels, activation_checkpoint, compile                on_model_created
    create_optimizer                                (wrapped)  on_optimizer_created
    create_scheduler                                (wrapped)
    restore a checkpoint, if there is one                      on_resumed
                                                    on_train_start
    for each optimizer step:
                                                    on_step_start
        for each micro-batch: loss, backward        (wrapped)
        optimizer_step                              (wrapped)  on_step_end
        each logging.every_steps                               on_log
        each eval.every_steps: evaluate             (wrapped)  on_evaluation_end
        each checkpoint.every_steps: save_checkpoint (wrapped) on_checkpoint_saved
                                                    on_train_end
    what is still to be evaluated and saved at the end, as above
                                                    on_run_end; on_error where one ended the run

An observer is a method `on_<event>(self, run, record) -> None`. It may ask `run.stop(reason)`,
`run.request_checkpoint()` and `run.request_evaluation()`, and change nothing else. A wrapper is a
method `wrap_<call>(self, run, call, *args)` that returns `call(*args)`, changed or not. The first
callback of the list is the outermost.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fasttrain.config.errors import Problem, UserError
from fasttrain.config.schema.base import ComponentSection
from fasttrain.core.batch import LossFunction, LossSum, StepBatch, StepResult
from fasttrain.core.data_report import DataReport
from fasttrain.core.interfaces import LanguageModel, PreparedData
from fasttrain.core.kernel_plan import KernelPlan

if TYPE_CHECKING:
    from fasttrain.core.run import Run


# --- records --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepStart:
    step: int  # 1-based number of the step that begins
    batch: StepBatch
    loss: LossFunction  # of one micro-batch, with its wrappers: what the step will call


@dataclass(frozen=True)
class StepEnd:
    step: int  # 1-based number of the step that ended
    batch: StepBatch
    result: StepResult  # tensors on the device: reading one waits for it


@dataclass(frozen=True)
class LogRecord:
    """One logged interval. Its first ten fields are a line of metrics.jsonl."""

    step: int
    epoch: float  # passes over the data so far
    loss: float  # nats per supervised token, over the interval
    lr: float  # of the interval's last step
    grad_norm: float  # of the interval's last step, before clipping
    tokens: int  # in the interval, nothing padded
    supervised_tokens: int
    tokens_per_second: float
    step_seconds: float  # mean
    peak_memory_bytes: int  # of the device; of the process on a CPU
    skipped_steps: int = 0  # in the interval, for want of a finite loss or gradient
    extras: dict[str, float] = field(default_factory=dict)  # of the loss, and Interval.metrics


@dataclass(frozen=True)
class EvaluationRecord:
    step: int
    loss: float  # nats per supervised token, weighted by tokens
    supervised_tokens: int
    seconds: float
    is_best: bool


@dataclass(frozen=True)
class CheckpointRecord:
    step: int
    kind: str  # registered name
    path: Path
    seconds: float


@dataclass(frozen=True)
class Resumed:
    step: int
    path: Path
    skipped: tuple[str, ...]  # checkpoints that were passed over, each with its reason


@dataclass(frozen=True)
class Result:
    """How a run ended; what `fasttrain.run` returns."""

    directory: Path
    step: int
    loss: float | None  # nats per supervised token, of the last logged interval
    eval_loss: float | None  # of the last evaluation
    reason: str
    finished: bool  # the whole horizon was trained
    exit_code: int


# --- the base class -------------------------------------------------------------------------------


class Callback:
    """Base of all callbacks. A method named on_* or wrap_* that is no hook is refused."""

    Config: ClassVar[type[ComponentSection] | None] = None

    def __init__(self, config: Any = None) -> None:
        self.config = config
        refuse_unknown_hooks(type(self))

    # Observers, in the order of a run.
    def on_run_start(self, run: Run, record: None) -> None: ...
    def on_tokenizer_created(self, run: Run, record: Any) -> None: ...
    def on_data_ready(self, run: Run, record: DataReport) -> None: ...
    def on_kernels_selected(self, run: Run, record: KernelPlan) -> None: ...
    def on_model_created(self, run: Run, record: LanguageModel) -> None: ...
    def on_optimizer_created(self, run: Run, record: torch.optim.Optimizer) -> None: ...
    def on_resumed(self, run: Run, record: Resumed) -> None: ...
    def on_train_start(self, run: Run, record: None) -> None: ...
    def on_step_start(self, run: Run, record: StepStart) -> None: ...
    def on_step_end(self, run: Run, record: StepEnd) -> None: ...
    def on_log(self, run: Run, record: LogRecord) -> None: ...
    def on_evaluation_end(self, run: Run, record: EvaluationRecord) -> None: ...
    def on_checkpoint_saved(self, run: Run, record: CheckpointRecord) -> None: ...
    def on_train_end(self, run: Run, record: None) -> None: ...
    def on_run_end(self, run: Run, record: Result) -> None: ...
    def on_error(self, run: Run, record: BaseException) -> None: ...

    # State that a resumed run continues with.
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback, as JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""


OBSERVERS: tuple[str, ...] = tuple(name for name in vars(Callback) if name.startswith("on_"))

# The calls that can be wrapped, and what each must return.
WRAPPABLE: dict[str, type | tuple[type, ...]] = {
    "load_source": object,  # a datasets.Dataset
    "create_tokenizer": object,  # a transformers tokenizer
    "tokenize": PreparedData,
    "create_model": LanguageModel,
    "select_kernels": KernelPlan,
    "create_optimizer": torch.optim.Optimizer,
    "create_scheduler": torch.optim.lr_scheduler.LRScheduler,
    "loss": LossSum,
    "backward": type(None),
    "optimizer_step": type(None),
    "evaluate": EvaluationRecord,
    "save_checkpoint": Path,
}


def refuse_unknown_hooks(callback: type[Callback]) -> None:
    """UserError, with the list of hooks, where a method is named like a hook and is none."""
    known = set(OBSERVERS) | {f"wrap_{name}" for name in WRAPPABLE}
    for name, value in inspect.getmembers(callback, callable):
        if name.startswith(("on_", "wrap_")) and name not in known:
            raise UserError(
                Problem(
                    key="callbacks",
                    what=f"{callback.__name__}.{name} is no hook ({value.__qualname__}).",
                    hint=f"The hooks are: {', '.join(sorted(known))}.",
                )
            )


# --- dispatch -------------------------------------------------------------------------------------


class Hooks:
    """The run's callbacks, called in order."""

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self.callbacks = list(callbacks)
        self._run: Run | None = None

    def bind(self, run: Run) -> None:
        """Say which run the callbacks are told about."""
        self._run = run

    @property
    def run(self) -> Run:
        assert self._run is not None, "hooks were used before bind()"
        return self._run

    def emit(self, event: str, record: Any = None) -> None:
        """Tell every observer of `event` (a name without `on_`)."""
        for callback in self.callbacks:
            getattr(callback, f"on_{event}")(self.run, record)

    def call(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function(*args)` through every wrapper of `name`, the first callback outermost."""
        wrapped = function
        for callback in reversed(self.callbacks):
            wrapper = getattr(callback, f"wrap_{name}", None)
            if wrapper is not None:
                wrapped = self._checked(callback, name, wrapper, wrapped)
        return wrapped(*args)

    def _checked(
        self,
        callback: Callback,
        name: str,
        wrapper: Callable[..., Any],
        inner: Callable[..., Any],
    ) -> Callable[..., Any]:
        expected = WRAPPABLE[name]

        def call(*args: Any) -> Any:
            result = wrapper(self.run, inner, *args)
            if not isinstance(result, expected) or (expected is object and result is None):
                raise TypeError(
                    f"{type(callback).__name__}.wrap_{name} returned {type(result).__name__}; "
                    f"it must return what call() returns ({_type_name(expected)})."
                )
            return result

        return call


def _type_name(expected: type | tuple[type, ...]) -> str:
    if expected is object:
        return "anything but None"
    types = expected if isinstance(expected, tuple) else (expected,)
    return " or ".join(kind.__name__ for kind in types)
