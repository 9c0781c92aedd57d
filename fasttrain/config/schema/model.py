"""`model:` and its transforms."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from fasttrain.config.schema.base import (
    ComponentSection,
    Fraction,
    LocalPath,
    NonNegativeFloat,
    PositiveInt,
    StringOrStrings,
    Strings,
)


class TransformSection(ComponentSection):
    """One change to the loaded model. The order is fixed: lora, activation_checkpoint, compile."""


class LoraConfig(TransformSection):
    """Train low-rank adapters instead of the weights (peft; arXiv 2106.09685)."""

    type: Literal["lora"] = "lora"
    r: PositiveInt = 16
    """Rank of the adapters."""
    alpha: NonNegativeFloat = 32.0
    """Scale: the adapter's output is multiplied by alpha / r."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    target_modules: Strings = ("all-linear",)
    """Module names that get an adapter, or `all-linear`: every linear layer but the head."""
    adapter_path: LocalPath | None = None
    """Directory of adapters saved before, to train on from."""


class KernelsTransformConfig(TransformSection):
    """Puts the selected kernels into the model, instance by instance. Always there; its options
    are the top-level `kernels:`."""

    type: Literal["kernels"] = "kernels"


class ActivationCheckpointConfig(TransformSection):
    """Keep only each layer's input and recompute the rest in backward: less memory, more time."""

    type: Literal["activation_checkpoint"] = "activation_checkpoint"
    every_layers: PositiveInt = 1
    """Checkpoint each n-th layer."""


class CompileConfig(TransformSection):
    """torch.compile on the model's layers."""

    type: Literal["compile"] = "compile"
    mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """torch.compile's mode."""
    dynamic: bool = True
    """Compile once for any sequence length; packed batches differ in length."""


class ModelSection(ComponentSection):
    """What every model section has."""

    transforms: tuple[TransformSection, ...] = ()
    """Changes to the loaded model: `lora`, `activation_checkpoint`, `compile`, or your own."""
    attention: Literal["auto", "per_document", "padded"] = "auto"
    """How packed documents are kept apart. `per_document`: attention runs document by document on
    the flat batch. `padded`: each document becomes a padded row, which any causal model can serve.
    `auto`: per_document where the model passes a check, else padded, with the reason."""
    freeze: StringOrStrings = ()
    """Globs of the names of parameters that are not trained, such as `*embed_tokens*`."""


class HuggingFaceModelConfig(ModelSection):
    """A causal language model from a local directory or a hub name, loaded by transformers."""

    type: Literal["huggingface"] = "huggingface"
    name_or_path: LocalPath
    """Directory, or name on the hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for code you have read."""
    config_overrides: dict[str, Any] = Field(default_factory=dict)
    """Values that replace those of the model's config.json, such as `rope_scaling`."""


class RandomModelConfig(ModelSection):
    """A model with random weights: an architecture of transformers and its sizes."""

    type: Literal["random"] = "random"
    architecture: str = "llama"
    """transformers' model type: `llama`, `qwen3`, `gemma2`, …"""
    config: dict[str, Any] = Field(default_factory=dict)
    """Sizes as the architecture's config names them: `hidden_size`, `num_hidden_layers`, …
    `vocab_size` and the special token ids come from the tokenizer where they are not given."""
