"""`kernels:` which implementation serves each op of the model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fasttrain.config.schema.base import Section, Strings

RESERVED = ("mode", "autotune", "deterministic", "providers", "sites")
# Ops of a step, which no module of the model is a site of.
OPTIMIZER_OPS = ("optimizer_step", "grad_norm", "newton_schulz")
# Backends that are somebody else's code.
PROVIDERS = ("sdpa", "flash-attn", "varlen", "flex", "liger", "compile")


class KernelsConfig(Section):
    """Reserved keys, and one key per op. By name: that backend or an error. `auto`: the fastest
    where times are known, else the first that can serve, and the table says why. `eager`: the site
    is left as the model defines it."""

    mode: Literal["auto", "eager", "strict"] = "auto"
    """`auto` may fall back, with a reason; `strict` makes that an error; `eager` uses none."""
    autotune: Literal["off", "cached", "full"] = "cached"
    """`cached`: times that were measured before decide. `full`: what has none is measured first.
    `off`: the order of preference."""
    deterministic: bool = False
    """Only kernels that give the same bits every time."""
    providers: Literal["all", "none"] | Strings = "all"
    """Kernels of others that `auto` may choose: sdpa, flash-attn, varlen, flex, liger, compile."""
    sites: dict[str, str | dict[str, str]] = Field(default_factory=dict)
    """By the modules' names: `"model.layers.0.*": eager`, or `"*.mlp": {swiglu: cpu}`. Goes before
    the keys below."""
    linear_cross_entropy: Literal["auto", "eager", "cpu", "triton", "cuda"] = "auto"
    """The output layer and the loss in one, with few of the logits at a time."""
    packed_attention: Literal[
        "auto", "eager", "cpu", "triton", "flash-attn", "varlen", "flex", "sdpa"
    ] = "auto"
    """Attention within the documents of a pack."""
    rope: Literal["auto", "eager", "cpu", "triton", "compile"] = "auto"
    """Rotary position embedding of queries and keys."""
    swiglu: Literal["auto", "eager", "cpu", "triton", "liger", "compile"] = "auto"
    """The gate of an MLP with SiLU."""
    geglu: Literal["auto", "eager", "cpu", "triton", "liger", "compile"] = "auto"
    """The gate of an MLP with GELU."""
    embedding: Literal["auto", "eager", "cpu", "triton"] = "auto"
    """The embedding of tokens."""
    rms_norm: Literal["auto", "eager", "cpu", "triton", "liger", "compile"] = "auto"
    """Root mean square layer norm."""
    optimizer_step: Literal["auto", "eager", "cpu", "cuda"] = "auto"
    """The step of all weights in one pass."""
    grad_norm: Literal["auto", "eager", "cpu", "cuda"] = "auto"
    """The norm of all gradients."""
    newton_schulz: Literal["auto", "eager", "cpu", "triton"] = "auto"
    """Muon's matrices, made orthogonal."""
