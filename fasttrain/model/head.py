"""The output head: what turns a hidden state into logits, as data that a fused loss can use."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# What the architectures call the factor that their logits are multiplied, or divided, by (Granite
# divides, HyperCLOVA X multiplies, under the same name), and the cap of their logits.
SCALE_NAMES = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier_scale")
SOFTCAP_NAMES = ("final_logit_softcapping", "logits_soft_cap", "softcap")

# Largest difference of two ways to the same logits, relative to the largest logit: a few roundings.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3}


class LinearParts(NamedTuple):
    """An output layer as data: hidden @ weight.T + bias + inner @ outer.T."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    adapter: (
        tuple[Tensor, Tensor] | None
    )  # inner (N, R) for the hidden states at hand, outer (V, R)


class LayerReader(Protocol):
    """Takes an output layer apart."""

    def why_not(self, layer: nn.Module) -> str | None:
        """The reason why what `layer` computes is more than its parts say, or None."""

    def parts(self, layer: nn.Module, hidden: Tensor) -> LinearParts:
        """Its parts for hidden (N, H)."""


def is_tampered_with(layer: nn.Module) -> bool:
    """Whether a call of `layer` does more than its class says."""
    hooks = (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        layer._backward_hooks,
        layer._backward_pre_hooks,
    )
    return "forward" in vars(layer) or any(hooks)


class PlainLinear:
    """Reads the layer that transformers ends a model with."""

    def why_not(self, layer: nn.Module) -> str | None:
        name = type(layer).__name__
        if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
            return f"{name} is not a plain linear layer"
        if is_tampered_with(layer):
            return f"{name}: hooks or a patch change what it computes"
        return None

    def parts(self, layer: nn.Module, hidden: Tensor) -> LinearParts:
        assert isinstance(layer, nn.Linear)
        return LinearParts(layer.weight, layer.bias, None)


class Head:
    """logits = cap(scale · (hidden @ weight.T + bias)), with cap(x) = softcap · tanh(x / softcap).

    It reads the model's own output layer each time, so it stays true when the weights move, are
    tied, or get adapters.
    """

    def __init__(self, causal_lm: PreTrainedModel, scale: float, softcap: float | None) -> None:
        self._causal_lm = causal_lm
        self.scale = scale
        self.softcap = softcap
        self.reader: LayerReader = PlainLinear()

    def why_not_fused(self) -> str | None:
        """The reason why a fused loss can't stand in for the layer, or None."""
        return self.reader.why_not(self.layer)

    def parts(self, hidden: Tensor) -> LinearParts:
        """The layer as data, for hidden (N, H); right where why_not_fused() is None."""
        return self.reader.parts(self.layer, hidden)

    @property
    def layer(self) -> nn.Module:
        """The output layer as the model has it; not a plain linear layer once it has adapters."""
        layer: nn.Module = self._causal_lm.get_output_embeddings()
        return layer

    @property
    def weight(self) -> Tensor:
        """(V, H)"""
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """(V,), or None."""
        return getattr(self.layer, "bias", None)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (N, H) -> (N, V), in fp32 (fp64 for an fp64 model)."""
        logits: Tensor = self.layer(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def find_head(causal_lm: PreTrainedModel) -> Head | None:
    """The head by which the model makes its own logits of its body's output.

    None where no scale or cap that the model's config names explains what the model does.
    """
    layer = causal_lm.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        return None
    ids = torch.zeros(1, 4, dtype=torch.int64, device=causal_lm.device)
    hidden: Tensor = causal_lm.base_model(input_ids=ids, use_cache=False)[0]
    large = _large_hidden(layer, ids.shape[1])
    entered, logits = _run_with_head_input(causal_lm, ids, large)
    config = causal_lm.config.get_text_config()
    for before in _scales(config):
        if not _close(hidden * before, entered) or (before != 1.0 and layer.bias is not None):
            continue
        for scale, softcap in product(_scales(config), _softcaps(config)):
            if _close(Head(causal_lm, scale, softcap).logits(large), logits):
                return Head(causal_lm, before * scale, softcap)
    return None


def _large_hidden(layer: nn.Linear, rows: int) -> Tensor:
    """(1, rows, H) of which `layer` makes values up to about 50: large enough that a cap shows."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, rows, layer.in_features, generator=generator).to(layer.weight)
    largest: Tensor = (hidden @ layer.weight.T).abs().max()
    return hidden * (50 / largest).nan_to_num(posinf=1.0)


def _run_with_head_input(
    causal_lm: PreTrainedModel, ids: Tensor, replacement: Tensor
) -> tuple[Tensor, Tensor]:
    """What enters the output layer in a run on `ids`, and the logits with `replacement` there."""
    entered = []

    def replace(_layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        entered.append(args[0])
        return (replacement,)

    hook = causal_lm.get_output_embeddings().register_forward_pre_hook(replace)
    try:
        logits: Tensor = causal_lm(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    return entered[0], logits


def _softcaps(config: Any) -> list[float | None]:
    named = [getattr(config, name, None) for name in SOFTCAP_NAMES]
    return [None, *(float(cap) for cap in named if cap)]


def _scales(config: Any) -> list[float]:
    named = [float(factor) for name in SCALE_NAMES if (factor := getattr(config, name, None))]
    return [1.0, *named, *(1 / factor for factor in named)]


def _close(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    allowed = TOLERANCE.get(theirs.dtype, 1e-5) * theirs.abs().max().item()
    return (ours - theirs).abs().max().item() <= allowed
