"""The whole config. Component sections are narrowed to the registered types when a file is read."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fasttrain.config.schema.base import (
    LocalPath,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Strings,
)
from fasttrain.config.schema.callback import CallbackSection
from fasttrain.config.schema.checkpoint import (
    CheckpointSection,
    HuggingFaceCheckpointConfig,
    ShardedCheckpointConfig,
)
from fasttrain.config.schema.data import DataSection
from fasttrain.config.schema.engine import AutoEngineConfig, EngineSection
from fasttrain.config.schema.kernels import KernelsConfig
from fasttrain.config.schema.model import ModelSection
from fasttrain.config.schema.optimizer import AdamWConfig, OptimizerSection
from fasttrain.config.schema.run import EvalConfig, LoggingConfig
from fasttrain.config.schema.scheduler import CosineConfig, SchedulerSection
from fasttrain.config.schema.tokenizer import HuggingFaceTokenizerConfig, TokenizerSection
from fasttrain.config.schema.trainer import SFTConfig, TrainerSection

DEFAULT_CHECKPOINTS: tuple[CheckpointSection, ...] = (
    ShardedCheckpointConfig(every_steps=200),
    HuggingFaceCheckpointConfig(),
)


class TrainConfig(Section):
    """One training run."""

    type: str = "sft"
    """The method: `sft` learns answers, `causal` learns every token; or your own trainer."""
    trainer: TrainerSection = Field(default_factory=SFTConfig)
    """Options of the method; its own `type` is the one above."""
    imports: Strings = ()
    """Python modules or files (`./my_code.py`) that register components of your own."""
    model: ModelSection
    """The model, and what is done to it."""
    tokenizer: TokenizerSection = Field(default_factory=HuggingFaceTokenizerConfig)
    """The tokenizer. Default: the model's."""
    data: DataSection
    """What the run learns from."""
    optimizer: OptimizerSection = Field(default_factory=AdamWConfig)
    """How gradients change the weights."""
    scheduler: SchedulerSection = Field(default_factory=CosineConfig)
    """How the learning rate moves."""
    engine: EngineSection = Field(default_factory=AutoEngineConfig)
    """How a step runs."""
    kernels: KernelsConfig = Field(default_factory=KernelsConfig)
    """Which kernels serve the model."""
    checkpoint: tuple[CheckpointSection, ...] = DEFAULT_CHECKPOINTS
    """What is written, and when. Default: a resumable checkpoint each 200 steps and at the end, and
    the model for transformers at the end."""
    eval: EvalConfig = Field(default_factory=EvalConfig)
    """When the held-out data are evaluated."""
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    """What is printed and written."""
    callbacks: tuple[CallbackSection, ...] = ()
    """Further callbacks; console, metrics file, loss plot, kernel selection and the non-finite
    guard are always there, and an entry here with their name sets their options."""
    epochs: PositiveFloat | None = None
    """Passes over the data. With max_steps: whichever ends first. Neither: one epoch."""
    max_steps: PositiveInt | None = None
    """Optimizer steps in all."""
    stop_after: PositiveInt | None = None
    """Stop after this many steps of this process; the schedule stays. A later start goes on."""
    micro_batch_size: PositiveInt = 1
    """Packs (rows, when unpacked) in one forward pass."""
    gradient_accumulation_steps: PositiveInt | None = None
    """Micro-batches of one optimizer step. Default: 1, or what global_batch_size implies."""
    global_batch_size: PositiveInt | None = None
    """Packs (rows, when unpacked) of one optimizer step, over all devices."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are scaled down to this 2-norm. 0: never."""
    precision: Literal["auto", "fp32", "bf16-mixed", "bf16"] = "auto"
    """`bf16-mixed`: bf16 arithmetic and weights, of which the optimizer keeps fp32 masters (with
    another library's optimizer the weights are fp32). `bf16`: no masters; see optimizer.rounding.
    `auto`: bf16-mixed where the GPU has bf16, else fp32."""
    seed: NonNegativeInt = 42
    """Seed of the weights, the data order and dropout."""
    output_dir: LocalPath | None = None
    """Run directory. Default: `runs/<name of the config file>`."""
    resume: LocalPath = "auto"
    """`auto`: go on with an unfinished run in output_dir; `never`: start anew; or the path of a
    checkpoint or of a run directory."""
    overfit_first_batch: bool = False
    """Train on the first batch again and again: the loss must fall towards 0."""
    kill_file: LocalPath | None = None
    """When this file appears, the run saves and stops. Default: `STOP` in the run directory."""
