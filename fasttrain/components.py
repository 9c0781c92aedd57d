"""The table of built-ins: data only, so that reading it loads neither torch nor transformers.

The `config` half (torch-free) serves validate, schema, show-config and the docs; the `component`
half is imported only when a run needs it. Components of your own use the registries' decorator.
"""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """Where a built-in's typed section and its class live, as `module:Name`.

    An empty `component` marks a name that is resolved to another before build (`engine: auto`).
    """

    config: str
    component: str


_SCHEMA = "fasttrain.config.schema"

BUILT_INS: dict[tuple[str, str], Entry] = {
    ("trainer", "sft"): Entry(f"{_SCHEMA}.trainer:SFTConfig", "fasttrain.trainers.sft:SFTTrainer"),
    ("trainer", "causal"): Entry(
        f"{_SCHEMA}.trainer:CausalConfig", "fasttrain.trainers.causal:CausalTrainer"
    ),
    ("model", "huggingface"): Entry(
        f"{_SCHEMA}.model:HuggingFaceModelConfig", "fasttrain.model.hf:HuggingFaceModelFactory"
    ),
    ("model", "random"): Entry(
        f"{_SCHEMA}.model:RandomModelConfig", "fasttrain.model.hf:RandomModelFactory"
    ),
    ("transform", "lora"): Entry(
        f"{_SCHEMA}.model:LoraConfig", "fasttrain.model.transforms.lora:LoraTransform"
    ),
    ("transform", "kernels"): Entry(
        f"{_SCHEMA}.model:KernelsTransformConfig",
        "fasttrain.model.transforms.kernels:KernelsTransform",
    ),
    ("transform", "activation_checkpoint"): Entry(
        f"{_SCHEMA}.model:ActivationCheckpointConfig",
        "fasttrain.model.transforms.activation_checkpoint:ActivationCheckpointTransform",
    ),
    ("transform", "compile"): Entry(
        f"{_SCHEMA}.model:CompileConfig", "fasttrain.model.transforms.compile:CompileTransform"
    ),
    ("tokenizer", "huggingface"): Entry(
        f"{_SCHEMA}.tokenizer:HuggingFaceTokenizerConfig",
        "fasttrain.tokenizer.hf:HuggingFaceTokenizerFactory",
    ),
    ("tokenizer", "trained"): Entry(
        f"{_SCHEMA}.tokenizer:TrainedTokenizerConfig",
        "fasttrain.tokenizer.trained:TrainedTokenizerFactory",
    ),
    ("data", "packed"): Entry(f"{_SCHEMA}.data:DataSection", "fasttrain.data.factory:PackedData"),
    ("source", "file"): Entry(
        f"{_SCHEMA}.data:FileSourceConfig", "fasttrain.data.sources.file:FileSource"
    ),
    ("source", "huggingface"): Entry(
        f"{_SCHEMA}.data:HuggingFaceSourceConfig",
        "fasttrain.data.sources.huggingface:HuggingFaceSource",
    ),
    ("source", "python_stdlib"): Entry(
        f"{_SCHEMA}.data:PythonStdlibSourceConfig",
        "fasttrain.data.sources.python_stdlib:PythonStdlibSource",
    ),
    ("optimizer", "adamw"): Entry(
        f"{_SCHEMA}.optimizer:AdamWConfig", "fasttrain.optimizer.adamw:AdamWFactory"
    ),
    ("optimizer", "lion"): Entry(
        f"{_SCHEMA}.optimizer:LionConfig", "fasttrain.optimizer.lion:LionFactory"
    ),
    ("optimizer", "sgd"): Entry(
        f"{_SCHEMA}.optimizer:SGDConfig", "fasttrain.optimizer.sgd:SGDFactory"
    ),
    ("optimizer", "adafactor"): Entry(
        f"{_SCHEMA}.optimizer:AdafactorConfig", "fasttrain.optimizer.adafactor:AdafactorFactory"
    ),
    ("optimizer", "schedule_free_adamw"): Entry(
        f"{_SCHEMA}.optimizer:ScheduleFreeAdamWConfig",
        "fasttrain.optimizer.schedule_free:ScheduleFreeAdamWFactory",
    ),
    ("optimizer", "torchao_adamw"): Entry(
        f"{_SCHEMA}.optimizer:TorchaoAdamWConfig",
        "fasttrain.optimizer.torchao_adamw:TorchaoAdamWFactory",
    ),
    ("optimizer", "bitsandbytes_adamw"): Entry(
        f"{_SCHEMA}.optimizer:BitsandbytesAdamWConfig",
        "fasttrain.optimizer.bitsandbytes_adamw:BitsandbytesAdamWFactory",
    ),
    ("scheduler", "constant"): Entry(
        f"{_SCHEMA}.scheduler:ConstantConfig", "fasttrain.scheduler.constant:ConstantFactory"
    ),
    ("scheduler", "linear"): Entry(
        f"{_SCHEMA}.scheduler:LinearConfig", "fasttrain.scheduler.linear:LinearFactory"
    ),
    ("scheduler", "cosine"): Entry(
        f"{_SCHEMA}.scheduler:CosineConfig", "fasttrain.scheduler.cosine:CosineFactory"
    ),
    ("scheduler", "wsd"): Entry(
        f"{_SCHEMA}.scheduler:WsdConfig", "fasttrain.scheduler.wsd:WsdFactory"
    ),
    ("checkpoint", "sharded"): Entry(
        f"{_SCHEMA}.checkpoint:ShardedCheckpointConfig",
        "fasttrain.checkpoint.sharded:ShardedCheckpoint",
    ),
    ("checkpoint", "huggingface"): Entry(
        f"{_SCHEMA}.checkpoint:HuggingFaceCheckpointConfig",
        "fasttrain.checkpoint.huggingface:HuggingFaceCheckpoint",
    ),
    ("engine", "auto"): Entry(f"{_SCHEMA}.engine:AutoEngineConfig", ""),
    ("engine", "local"): Entry(
        f"{_SCHEMA}.engine:LocalEngineConfig", "fasttrain.engine.local:LocalEngine"
    ),
    ("callback", "console"): Entry(
        f"{_SCHEMA}.callback:ConsoleConfig", "fasttrain.callbacks.console:Console"
    ),
    ("callback", "metrics_file"): Entry(
        f"{_SCHEMA}.callback:MetricsFileConfig", "fasttrain.callbacks.metrics_file:MetricsFile"
    ),
    ("callback", "loss_plot"): Entry(
        f"{_SCHEMA}.callback:LossPlotConfig", "fasttrain.callbacks.loss_plot:LossPlot"
    ),
    ("callback", "tensorboard"): Entry(
        f"{_SCHEMA}.callback:TensorBoardConfig", "fasttrain.callbacks.tensorboard:TensorBoard"
    ),
    ("callback", "kernel_selection"): Entry(
        f"{_SCHEMA}.callback:KernelSelectionConfig",
        "fasttrain.callbacks.kernel_selection:KernelSelection",
    ),
    ("callback", "nonfinite_guard"): Entry(
        f"{_SCHEMA}.callback:NonFiniteGuardConfig",
        "fasttrain.callbacks.nonfinite_guard:NonFiniteGuard",
    ),
    ("callback", "canary"): Entry(
        f"{_SCHEMA}.callback:CanaryConfig", "fasttrain.callbacks.canary:Canary"
    ),
    ("callback", "samples"): Entry(
        f"{_SCHEMA}.callback:SamplesConfig", "fasttrain.callbacks.samples:Samples"
    ),
    ("callback", "unigram_baseline"): Entry(
        f"{_SCHEMA}.callback:UnigramBaselineConfig",
        "fasttrain.callbacks.unigram_baseline:UnigramBaseline",
    ),
    ("callback", "early_stopping"): Entry(
        f"{_SCHEMA}.callback:EarlyStoppingConfig",
        "fasttrain.callbacks.early_stopping:EarlyStopping",
    ),
}

# What a section without `type` means.
DEFAULT_TYPES: dict[str, str] = {
    "model": "huggingface",
    "tokenizer": "huggingface",
    "data": "packed",
    "optimizer": "adamw",
    "scheduler": "cosine",
    "engine": "auto",
}

# Callbacks every run has, outermost first; an entry of that name under `callbacks:` replaces it, as
# does one of a class derived from it.
ALWAYS_CALLBACKS: tuple[str, ...] = (
    "nonfinite_guard",
    "metrics_file",
    "loss_plot",
    "console",
)
# The same, inside all others: what it decides is there for everybody's wrappers to change.
INNERMOST_CALLBACKS: tuple[str, ...] = ("kernel_selection",)

# Transforms of the model in the order that works: adapters change which modules there are, kernels
# take their sites, checkpointing wraps the layers, and what is compiled is the result.
TRANSFORM_ORDER: tuple[str, ...] = ("lora", "kernels", "activation_checkpoint", "compile")
