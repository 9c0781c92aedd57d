"""Models made by transformers: pretrained ones, and architectures with random weights."""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fasttrain.config.errors import Problem, UserError
from fasttrain.config.schema.model import HuggingFaceModelConfig, ModelSection, RandomModelConfig
from fasttrain.core.interfaces import ModelFactory
from fasttrain.model.head import Head, find_head
from fasttrain.model.language_model import HFLanguageModel, Source, max_positions
from fasttrain.model.names import did_you_mean
from fasttrain.model.probe import evaluating, exact_products
from fasttrain.model.separation import Separation, choose_separation
from fasttrain.model.weights import load_weights, read_config
from fasttrain.runtime.precision import Precision

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class HuggingFaceModelFactory(ModelFactory):
    """A causal language model from a directory or from the hub."""

    Config = HuggingFaceModelConfig

    def max_length(self) -> int | None:
        return max_positions(read_config(self.config))

    def build(
        self, *, tokenizer: Any, precision: Precision, device: torch.device
    ) -> HFLanguageModel:
        config = read_config(self.config)
        _refuse_foreign_tokenizer(tokenizer, config)
        causal_lm = load_weights(self.config, config, precision.parameters)
        return as_language_model(causal_lm.to(device), self.config)

    def skeleton(self) -> HFLanguageModel:
        """The model without weights, on the meta device: modules, names and shapes."""
        return _skeleton(read_config(self.config), self.config)


class RandomModelFactory(ModelFactory):
    """An architecture of transformers with weights as it initialises them, by torch's seed."""

    Config = RandomModelConfig

    def max_length(self) -> int | None:
        return max_positions(self._transformers_config({}))

    def build(
        self, *, tokenizer: Any, precision: Precision, device: torch.device
    ) -> HFLanguageModel:
        config = self._transformers_config(_tokenizer_facts(tokenizer))
        _refuse_foreign_tokenizer(tokenizer, config)
        # On the CPU, so that a seed gives the same weights whatever the device.
        causal_lm = _from_config(config, self.config.architecture, precision.parameters)
        return as_language_model(causal_lm.to(device), self.config)

    def skeleton(self) -> HFLanguageModel:
        """The model without weights, on the meta device; a vocabulary size that only the tokenizer
        knows is the architecture's default."""
        return _skeleton(self._transformers_config({}), self.config)

    def _transformers_config(self, defaults: dict[str, Any]) -> Any:
        architecture, given = self.config.architecture, self.config.config
        _refuse_unknown_architecture(architecture)
        known = _config_keys(CONFIG_MAPPING[architecture])
        _refuse_unknown_sizes(architecture, given, known)
        defaults = {key: value for key, value in defaults.items() if key in known}
        try:
            return AutoConfig.for_model(architecture, **(defaults | given))
        except Exception as error:  # what a config class makes of a bad size is of nearly any type
            raise _unusable(architecture, error) from error


def as_language_model(causal_lm: PreTrainedModel, section: ModelSection) -> HFLanguageModel:
    """Body, head and the way documents are kept apart, each checked on a few tokens."""
    name = type(causal_lm).__name__
    try:
        with evaluating(causal_lm), exact_products():
            head = find_head(causal_lm)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise _unusable(name, error) from error
    if head is None:
        what = f"{name} does not end in a linear layer over the vocabulary that can be read."
        raise UserError(Problem(key="model", what=what, hint="Choose a causal language model."))
    separation = choose_separation(causal_lm, section.attention)
    return HFLanguageModel(causal_lm, separation, head, source=_source(causal_lm, section))


def _source(causal_lm: PreTrainedModel, section: ModelSection) -> Source | None:
    if not isinstance(section, HuggingFaceModelConfig):
        return None
    return Source(causal_lm.name_or_path, section.revision)


def _skeleton(config: Any, section: ModelSection) -> HFLanguageModel:
    with torch.device("meta"):
        causal_lm = _from_config(config, config.model_type, torch.float32)
    kind: Literal["per_document", "padded"] = (
        "padded" if section.attention == "padded" else "per_document"
    )
    standard = causal_lm.config._attn_implementation
    separation = Separation(kind, "not checked: there are no weights", standard)
    return HFLanguageModel(causal_lm, separation, Head(causal_lm, 1.0, None))


def _from_config(config: Any, name: str, dtype: torch.dtype) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # as above
        raise _unusable(name, error) from error


def _unusable(name: str, error: Exception) -> UserError:
    text = " ".join(str(error).split())[:300].rstrip(".")
    what = f"transformers can't make or run {name} as configured: {type(error).__name__}: {text}."
    return UserError(Problem(key="model", what=what, hint="Check the sizes in its config."))


# --- the tokenizer ------------------------------------------------------------------------------


def _refuse_foreign_tokenizer(tokenizer: Any, config: Any) -> None:
    """UserError where a token id has no row in the embedding."""
    rows, largest = config.get_text_config().vocab_size, _largest_id(tokenizer)
    if largest >= rows:
        raise UserError(
            Problem(
                key="tokenizer",
                what=f"its largest token id is {largest} and the model embeds {rows} tokens.",
                hint="Use the model's own tokenizer, or a model whose embedding was made larger.",
            )
        )


def _largest_id(tokenizer: Any) -> int:
    return max(tokenizer.get_vocab().values())


def _tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """What a new model takes from its tokenizer."""
    facts = {name: getattr(tokenizer, name, None) for name in SPECIAL_TOKENS}
    # The embedding of a padding token never gets a gradient, and the end token has to be learnt.
    if facts["pad_token_id"] == facts["eos_token_id"]:
        facts["pad_token_id"] = None
    return {"vocab_size": _largest_id(tokenizer) + 1, **facts}


# --- the keys of a config class -----------------------------------------------------------------


def _refuse_unknown_architecture(architecture: str) -> None:
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if architecture in known:
        return
    raise UserError(
        Problem(
            key="model.architecture",
            what=f"transformers has no causal language model of type '{architecture}'.",
            hint=did_you_mean(architecture, known, "Such as llama, qwen3, gemma2."),
        )
    )


def _refuse_unknown_sizes(architecture: str, given: dict[str, Any], known: set[str]) -> None:
    problems = [
        Problem(
            key=f"model.config.{key}",
            what=f"the config of {architecture} has no such key.",
            hint=did_you_mean(key, known),
        )
        for key in given
        if key not in known
    ]
    if problems:
        raise UserError(*problems)


def _config_keys(config_class: type) -> set[str]:
    """Names that a config class understands: its annotated fields, and other names for them."""
    fields = [getattr(base, "__annotations__", {}) for base in config_class.__mro__]
    return set().union(*fields, getattr(config_class, "attribute_map", {}))
