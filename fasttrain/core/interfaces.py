"""What the building blocks are to each other: one small interface each.

Shapes: T tokens of a batch, S supervised ones among them, V tokens of the vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    Protocol,
    TypeVar,
    get_args,
    runtime_checkable,
)

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from fasttrain.config.errors import Problem, UserError
from fasttrain.config.schema.base import ComponentSection
from fasttrain.core.batch import Batch, StepBatch
from fasttrain.core.data_report import DataReport
from fasttrain.core.kernel_plan import KernelPlan
from fasttrain.runtime.precision import Precision

if TYPE_CHECKING:
    from fasttrain.core.events import Hooks

T = TypeVar("T")


# --- topology -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Topology:
    """Where this process stands among all."""

    rank: int = 0
    world_size: int = 1
    data_parallel_rank: int = 0
    data_parallel_size: int = 1


# --- data room ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Examples:
    """What a method learns from: the kinds of rows it takes, and which tokens it supervises."""

    kinds: tuple[str, ...] = ("conversation", "text")
    supervise: Literal["answers", "all"] = "answers"


class TrainingData(ABC):
    """The training documents, packed and ordered per epoch independently of the world size."""

    @abstractmethod
    def steps_in_epoch(self, epoch: int) -> int:
        """Optimizer steps of epoch `epoch` (0-based)."""

    @abstractmethod
    def stream(self, epoch: int, step_in_epoch: int) -> Generator[StepBatch, None, None]:
        """This rank's step batches from a position on, without end; reached in O(1)."""

    @abstractmethod
    def token_counts(self, vocab_size: int) -> Tensor:
        """(vocab_size,) int64: how often each id is a supervised target in one epoch."""


class EvaluationData(ABC):
    """The held-out documents, always in the same order."""

    @abstractmethod
    def batches(self) -> Iterator[Batch]:
        """This rank's batches."""

    @abstractmethod
    def prompts(self, count: int) -> list[tuple[str, str]]:
        """Up to `count` (prompt with its template, expected answer) pairs, spread over the rows."""


@dataclass(frozen=True)
class PreparedData:
    """What the data block hands to the run."""

    train: TrainingData
    evaluation: EvaluationData | None
    report: DataReport
    profile_lengths: tuple[int, ...]  # lengths of up to 4096 training documents
    fingerprint: str  # of the training documents; a resumed run must have the same


class LoadedData(ABC):
    """Rows that are read and understood, not yet tokenised."""

    @abstractmethod
    def texts(self) -> Iterator[str]:
        """The training text, for a tokenizer that is trained on it."""

    @property
    @abstractmethod
    def has_conversations(self) -> bool:
        """Whether any row needs a chat template."""


class Source(ABC):
    """Where rows come from. `Config` is its typed section."""

    Config: ClassVar[type[ComponentSection]]
    note: str = ""  # what load() did with the rows that the user should know, for the report

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def load(self) -> Any:
        """The rows, as a `datasets.Dataset`. An optional column `group` keeps rows together when
        held-out rows are drawn."""


class DataFactory(ABC):
    """Turns sources into batches, in two phases, since a tokenizer may be trained in between."""

    Config: ClassVar[type[ComponentSection]]

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def load(self, *, examples: Examples, seed: int, hooks: Hooks) -> LoadedData:
        """Read, detect and check every row."""

    @abstractmethod
    def prepare(
        self,
        loaded: LoadedData,
        *,
        tokenizer: Any,
        model_max_length: int | None,
        micro_batch_size: int,
        accumulation: int,
        topology: Topology,
        seed: int,
        hooks: Hooks,
    ) -> PreparedData:
        """Tokenise, mask and pack."""


# --- tokenizer and model --------------------------------------------------------------------------


class TokenizerFactory(ABC):
    """Makes the tokenizer: a transformers `PreTrainedTokenizerFast`."""

    Config: ClassVar[type[ComponentSection]]

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def build(self, *, model_section: Any, data: LoadedData) -> Any:
        """`model_section` is the config's `model:`, whose tokenizer is the default."""


class LanguageModel(nn.Module, ABC):
    """Body, head and loss in one module: hooks, autocast and adapters apply to all of it."""

    longest_document: int | None = None
    """Tokens of the longest document it can take; None where there is no such limit."""

    def output_weight(self) -> nn.Parameter | None:
        """(V, H) of the output layer, tied or not; None where the model doesn't say."""
        return None

    @abstractmethod
    def token_losses(self, batch: Batch, *, reduction: Literal["sum", "none"] = "sum") -> Tensor:
        """Cross-entropy in nats of the supervised tokens: their sum () or each (S,), fp32."""

    @abstractmethod
    def logits(self, batch: Batch) -> Tensor:
        """(T, V) logits of every position, for a loss of your own."""

    @abstractmethod
    def generate(self, prompts: list[str], *, tokenizer: Any, max_new_tokens: int) -> list[str]:
        """Greedy continuations of texts that already carry the chat template."""

    @abstractmethod
    def save_pretrained(self, directory: Path, *, dtype: torch.dtype | None) -> None:
        """Write the model, or its adapters, as transformers or peft reads them."""

    @abstractmethod
    def describe(self) -> str:
        """One line: architecture, sizes, how documents are kept apart and why."""


class ModelFactory(ABC):
    """Loads or makes the model."""

    Config: ClassVar[type[ComponentSection]]

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def max_length(self) -> int | None:
        """The longest sequence the model was made for; reads its config only."""

    def skeleton(self) -> LanguageModel:
        """The model without weights, on the meta device, for tables that need no more."""
        raise UserError(
            Problem(
                key="model.type",
                what=f"{type(self).__name__} can't show its modules without building the model.",
                hint="Define skeleton() there, or use `fasttrain run --dry-run`.",
            )
        )

    @abstractmethod
    def build(self, *, tokenizer: Any, precision: Precision, device: torch.device) -> LanguageModel:
        """The model in `precision.parameters` on `device`, without transforms."""


class Transform(ABC):
    """One change made to a loaded model."""

    Config: ClassVar[type[ComponentSection]]

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def apply(self, model: LanguageModel, *, plan: KernelPlan) -> LanguageModel:
        """The changed model, usually the same object."""


# --- optimizer and schedule -----------------------------------------------------------------------


Role = Literal["matrices", "head", "embeddings", "vectors"]
ROLES: tuple[Role, ...] = get_args(Role)
DECAYED_ROLES: tuple[Role, ...] = ("matrices", "head")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are stepped alike.

    `role` says what they are. `matrices`: two dimensions or more, where all but the last two count
    matrices, as with experts; `head`: the output layer's weight, where it isn't tied;
    `embeddings`: of tokens, learnt positions and the like, a tied head among them; `vectors`:
    norms, biases and whatever has fewer than two dimensions. The last two never decay.
    """

    name: str
    role: Role
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    weight_decay: float
    learning_rate: float


class OptimizerFactory(ABC):
    """Makes the optimizer."""

    Config: ClassVar[type[ComponentSection]]
    keeps_masters: ClassVar[bool] = False
    """Whether it keeps fp32 masters of 16-bit parameters where `precision.masters` says so."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def kernel_facts(self, precision: Precision) -> Mapping[str, Mapping[str, Any]]:
        """The ops that its step is made of, with what their kernels are chosen by; none where the
        step is a library's own."""
        return {}

    @abstractmethod
    def build(
        self, groups: list[ParameterGroup], *, plan: KernelPlan, precision: Precision
    ) -> torch.optim.Optimizer:
        """An optimizer whose state per parameter is tensors and numbers, by name."""


@runtime_checkable
class ClippingOptimizer(Protocol):
    """An optimizer that measures and clips gradients itself, and skips on the device."""

    max_grad_norm: float | None
    found_inf: Tensor | None

    def measure(self) -> Tensor:
        """The norm of all gradients, () fp32, by which the next step clips and skips."""


class SchedulerFactory(ABC):
    """Makes the learning-rate schedule: a formula, or override `build` for any other."""

    Config: ClassVar[type[ComponentSection]]

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def factor(self, step: int, total_steps: int) -> float:
        """Learning rate of optimizer step `step` (0-based) as a share of the peak."""

    def check(self, total_steps: int) -> None:
        """UserError where the formula doesn't fit a run of so many steps; asked before the model
        is made."""
        if type(self).build is SchedulerFactory.build:
            self.factor(0, total_steps)

    def build(self, optimizer: torch.optim.Optimizer, *, total_steps: int) -> LRScheduler:
        """A schedule that counts optimizer steps."""
        return LambdaLR(optimizer, lambda step: self.factor(step, total_steps))
