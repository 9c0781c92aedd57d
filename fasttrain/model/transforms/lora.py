"""Low-rank adapters through peft: y = W x + (alpha / r) · B A x, with W frozen (arXiv 2106.09685).

The only place that knows peft.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from fasttrain.config.errors import Problem, UserError
from fasttrain.config.schema.model import LoraConfig
from fasttrain.core.interfaces import LanguageModel, Transform
from fasttrain.core.kernel_plan import KernelPlan
from fasttrain.model.export import cast
from fasttrain.model.head import LinearParts, PlainLinear, is_tampered_with
from fasttrain.model.language_model import HFLanguageModel
from fasttrain.model.names import did_you_mean, listed
from fasttrain.model.quiet import quiet_transformers

KEY = "model.transforms.lora"
ALL_LINEAR = "all-linear"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
EMBEDDINGS = {"embed_tokens", "lm_head"}  # what peft saves whole when it carries an adapter


class LoraTransform(Transform):
    """Puts adapters beside the chosen layers, in place, and freezes everything else."""

    Config = LoraConfig

    def apply(self, model: LanguageModel, *, plan: KernelPlan) -> LanguageModel:
        assert isinstance(model, HFLanguageModel)
        peft = import_peft()
        if model.source is None:
            raise UserError(
                Problem(
                    key=KEY,
                    what="the model has random weights, which nothing saves: its adapters would be "
                    "of no use later.",
                    hint="Train it without lora, or set model.name_or_path.",
                )
            )
        if self.config.adapter_path is None:
            config = self._new_config(peft, model.causal_lm)
        else:
            config = read_adapter_config(peft, Path(self.config.adapter_path).expanduser())
            self._refuse_other_shape(config)
        config.inference_mode = False
        config.base_model_name_or_path = model.source.name
        config.revision = model.source.revision
        adapters = attach(peft, model.causal_lm, config)
        if self.config.adapter_path is not None:
            load_adapters(peft, adapters.peft_model, Path(self.config.adapter_path).expanduser())
        model.adapters = adapters
        if hasattr(model.head.layer, "lora_A"):
            model.head.reader = AdaptedLinear()
        return model

    def _new_config(self, peft: Any, causal_lm: PreTrainedModel) -> Any:
        targets = self.config.target_modules
        if ALL_LINEAR in targets and len(targets) > 1:
            what = f"target_modules names {ALL_LINEAR} and others."
            raise UserError(Problem(key=f"{KEY}.target_modules", what=what, hint="Choose one."))
        if ALL_LINEAR not in targets:
            refuse_unmatched(causal_lm, targets)
        return peft.LoraConfig(
            r=self.config.r,
            lora_alpha=self.config.alpha,
            lora_dropout=self.config.dropout,
            target_modules=ALL_LINEAR if ALL_LINEAR in targets else list(targets),
            task_type="CAUSAL_LM",
        )

    def _refuse_other_shape(self, saved: Any) -> None:
        """What the adapters of adapter_path were made with can't be changed."""
        given = self.config.model_fields_set
        pairs = (("r", self.config.r, saved.r), ("alpha", self.config.alpha, saved.lora_alpha))
        for name, ours, theirs in pairs:
            if name in given and ours != theirs:
                what = f"the adapters in {self.config.adapter_path} were made with {theirs}."
                raise UserError(
                    Problem(key=f"{KEY}.{name}", what=what, hint=f"Leave {name} out, got {ours}.")
                )


@dataclass(frozen=True)
class LoraAdapters:
    """The adapters of one model. `peft_model` shares its modules with the model they sit in."""

    peft_model: Any

    def save(self, directory: Path, dtype: torch.dtype | None) -> None:
        """adapter_config.json and adapter_model.safetensors, as peft reads them."""
        targets = set(self.peft_model.peft_config["default"].target_modules)
        state = None if dtype is None else cast(self.peft_model.state_dict(), dtype)
        with quiet_transformers():
            self.peft_model.save_pretrained(
                directory,
                state_dict=state,
                # Otherwise peft asks the hub whether the vocabulary has grown.
                save_embedding_layers=bool(targets & EMBEDDINGS),
            )

    def describe(self) -> str:
        config = self.peft_model.peft_config["default"]
        layers = sum(1 for module in self.peft_model.modules() if hasattr(module, "lora_A"))
        return f"lora r={config.r} alpha={config.lora_alpha:g} on {layers} layers"


class AdaptedLinear:
    """Reads an output layer that has adapters: inner = scaling · A dropout(hidden), outer = B."""

    def why_not(self, layer: Any) -> str | None:
        reason = PlainLinear().why_not(layer.base_layer)
        if reason is not None:
            return reason
        if any(map(is_tampered_with, layer.modules())):
            return "hooks or a patch change what its adapters compute"
        if layer.merged or layer.lora_variant or any(layer.lora_bias.values()):
            return "its adapters are merged, or more than a product of two matrices"
        return None

    def parts(self, layer: Any, hidden: Tensor) -> LinearParts:
        base = layer.base_layer
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        if layer.disable_adapters or not names:
            return LinearParts(base.weight, base.bias, None)
        inner, outer = [], []
        for name in names:
            down, up = layer.lora_A[name], layer.lora_B[name]
            dropped = layer.lora_dropout[name](hidden.to(down.weight.dtype))
            inner.append(down(dropped) * layer.scaling[name])
            outer.append(up.weight)
        # Adapters may be of float32 where the layer is of bfloat16: as peft's result, so the sum.
        adapter = (torch.cat(inner, 1).to(hidden.dtype), torch.cat(outer, 1).to(base.weight.dtype))
        return LinearParts(base.weight, base.bias, adapter)


def import_peft() -> Any:
    """The package, or a UserError that says how to install it."""
    try:
        import peft
    except ImportError as error:
        hint = 'Install it with `pip install peft`, or fasttrain with its extra "lora".'
        raise UserError(Problem(key=KEY, what=f"lora needs peft ({error}).", hint=hint)) from error
    return peft


def attach(peft: Any, causal_lm: PreTrainedModel, config: Any) -> LoraAdapters:
    """Fresh adapters inside `causal_lm`; everything else is frozen."""
    try:
        # peft asks transformers for something by a name that is going out of use.
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            return LoraAdapters(peft.get_peft_model(causal_lm, config, revision=config.revision))
    except ValueError as error:
        what = f"peft can't put adapters there: {' '.join(str(error).split())}"
        raise UserError(Problem(key=f"{KEY}.target_modules", what=what)) from error


def refuse_unmatched(causal_lm: PreTrainedModel, targets: tuple[str, ...]) -> None:
    """UserError for each name that no module has; peft would pass over it where others match."""
    names = [name for name, _ in causal_lm.named_modules()]
    last_parts = {
        name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()
    }
    problems = [
        Problem(
            key=f"{KEY}.target_modules",
            what=f"no module is called '{target}'.",
            hint=did_you_mean(target, last_parts, f"There are: {listed(sorted(last_parts))}."),
        )
        for target in targets
        if not any(name == target or name.endswith(f".{target}") for name in names)
    ]
    if problems:
        raise UserError(*problems)


# --- adapters on disk ---------------------------------------------------------------------------


def read_adapter_config(peft: Any, directory: Path) -> Any:
    """The saved config, or a UserError: no LoRA adapters, or none in safetensors."""
    where, key = str(directory), f"{KEY}.adapter_path"
    if not (directory / CONFIG_FILE).is_file():
        hint = "Give a directory that was written as adapters."
        raise UserError(
            Problem(where=where, key=key, what=f"no {CONFIG_FILE} is there.", hint=hint)
        )
    if not (directory / WEIGHTS_FILE).is_file():
        what = f"no {WEIGHTS_FILE} is there; other formats run code when they are read."
        raise UserError(Problem(where=where, key=key, what=what))
    kind = json.loads((directory / CONFIG_FILE).read_text("utf-8")).get("peft_type")
    if kind != "LORA":
        raise UserError(Problem(where=where, key=key, what=f"the adapters are {kind}, not LORA."))
    return peft.PeftConfig.from_pretrained(directory)


def load_adapters(peft: Any, peft_model: Any, directory: Path) -> None:
    """Fill the adapters from disk; a missing, surplus or misshapen tensor is a UserError."""
    where, key = str(directory), f"{KEY}.adapter_path"
    try:
        state = load_file(directory / WEIGHTS_FILE)
        result = peft.set_peft_model_state_dict(peft_model, state)
    except (RuntimeError, OSError) as error:
        what = f"the adapters don't fit the model: {' '.join(str(error).split())[:300]}"
        raise UserError(Problem(where=where, key=key, what=what)) from error
    missing = [name for name in result.missing_keys if "lora_" in name]
    surplus = list(result.unexpected_keys)
    for names, what in ((missing, "lack"), (surplus, "have more than the model:")):
        if names:
            what = f"the adapters {what} {listed(sorted(names))}."
            hint = "Were they made for this model?"
            raise UserError(Problem(where=where, key=key, what=what, hint=hint))
