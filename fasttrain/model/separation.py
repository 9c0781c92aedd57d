"""How a model keeps the documents of a flat batch apart, and the proof that it does.

`per_document` runs attention document by document on the flat batch; `padded` gives each document a
row of its own. Neither is taken on trust: a few tokens go through the actual model, packed and one
document at a time, and the two must agree.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fasttrain.config.errors import Problem, UserError
from fasttrain.core.batch import Batch
from fasttrain.model import packed_attention, padded
from fasttrain.model.probe import evaluating, exact_products, probe_batch

Kind = Literal["per_document", "padded"]
SERVED_LAYERS = {"full_attention", "sliding_attention"}

# Largest relative difference (2-norm) of hidden states that rounding may cause over the depth of a
# model. A document that sees its neighbour, or wrong positions, differs by 1e-2 and more.
TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
FP32_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Separation:
    """The way that was chosen, and why."""

    kind: Kind
    reason: str
    standard_attention: str  # transformers' own implementation, which generation uses


def choose_separation(
    causal_lm: PreTrainedModel, requested: Literal["auto", "per_document", "padded"]
) -> Separation:
    """The way `model.attention` asks for, checked on this model, which is left set up for it.

    UserError where the way asked for, or every way, fails the check.
    """
    standard = causal_lm.config._attn_implementation
    why_not = None
    with evaluating(causal_lm), exact_products():
        alone = _alone(causal_lm)
        if requested != "padded":
            why_not = _why_not_per_document(causal_lm, alone)
            if why_not is None:
                causal_lm.set_attn_implementation(packed_attention.IMPLEMENTATION)
                return Separation("per_document", "checked: packed documents are apart", standard)
            if requested == "per_document":
                raise _refused("per_document", why_not, "Use model.attention=auto.")
        padding_fails = _differs(_padded(causal_lm), alone)
        if padding_fails is not None:
            raise _refused("padded", padding_fails, "It seems not to be a causal model.")
    reason = f"not per_document: {why_not}" if why_not else "asked for"
    return Separation("padded", reason, standard)


def _refused(kind: Kind, reason: str, hint: str) -> UserError:
    what = f"'{kind}' can't keep this model's documents apart: {reason}."
    return UserError(Problem(key="model.attention", what=what, hint=hint))


# --- per document -------------------------------------------------------------------------------


def _why_not_per_document(causal_lm: PreTrainedModel, alone: list[Tensor]) -> str | None:
    reason = _structural_reason(causal_lm)
    if reason is not None:
        return reason
    windows: list[int | None] = []

    def packed(batch: Batch) -> Tensor:
        return packed_attention.hidden_states(causal_lm.base_model, batch, windows=windows)

    try:
        name = packed_attention.IMPLEMENTATION
        with packed_attention.attention_implementation(causal_lm, name):
            reason = _differs(_documents(packed, probe_batch(causal_lm)), alone)
            seen = list(windows)
            reason = reason or _leak(causal_lm, packed)
    except packed_attention.UnsupportedAttention as error:
        return str(error)
    return reason or _wrong_windows(causal_lm, seen)


def _structural_reason(causal_lm: PreTrainedModel) -> str | None:
    """What a look at the model says against per_document, before anything runs."""
    name = type(causal_lm).__name__
    config = causal_lm.config.get_text_config()
    if not (causal_lm._supports_attention_backend and causal_lm._can_set_attn_implementation()):
        return f"{name} does not take its attention from transformers' table"
    if "position_ids" not in inspect.signature(causal_lm.base_model.forward).parameters:
        return f"{name} takes no position_ids, so positions can't restart in each document"
    other = sorted(set(getattr(config, "layer_types", None) or ()) - SERVED_LAYERS)
    if other:
        return f"{name} has layers of the kind {', '.join(other)}"
    return None


def _leak(causal_lm: PreTrainedModel, packed: Callable[[Batch], Tensor]) -> str | None:
    """The reason, where the middle document notices that its neighbours have changed."""
    same = _documents(packed, probe_batch(causal_lm))[1]
    changed = _documents(packed, probe_batch(causal_lm, change_neighbours=True))[1]
    if _relative_difference(changed, same) <= _tolerance(same):
        return None
    return "a document's output changes with its neighbours"


def _wrong_windows(causal_lm: PreTrainedModel, seen: list[int | None]) -> str | None:
    """The reason, where attention was not told of the sliding windows that the config describes.
    The probe's documents are shorter than most windows: outputs alone would not show it."""
    config = causal_lm.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or ["sliding_attention"] * len(seen)
    expected = [window if kind == "sliding_attention" else None for kind in layers]
    if len(seen) != len(expected):
        return f"it has {len(expected)} layers and {len(seen)} calls of attention"
    for layer, (ours, theirs) in enumerate(zip(seen, expected, strict=True)):
        if ours != theirs:
            return f"layer {layer} has the sliding window {theirs}, its attention asks for {ours}"
    return None


# --- the comparison -----------------------------------------------------------------------------


def _alone(causal_lm: PreTrainedModel) -> list[Tensor]:
    """Each document by itself, with the attention that transformers gives the model."""
    batch = probe_batch(causal_lm)
    documents = batch.input_ids.split(list(batch.layout.lengths))
    return [causal_lm.base_model(input_ids=ids[None], use_cache=False)[0][0] for ids in documents]


def _padded(causal_lm: PreTrainedModel) -> list[Tensor]:
    def run(batch: Batch) -> Tensor:
        return padded.hidden_states(causal_lm.base_model, batch)

    return _documents(run, probe_batch(causal_lm))


def _documents(run: Callable[[Batch], Tensor], batch: Batch) -> list[Tensor]:
    return list(run(batch).split(list(batch.layout.lengths)))


def _differs(ours: list[Tensor], alone: list[Tensor]) -> str | None:
    """The reason, where a document comes out otherwise than by itself."""
    worst = max(_relative_difference(a, b) for a, b in zip(ours, alone, strict=True))
    if worst <= _tolerance(alone[0]):
        return None
    return f"a document comes out otherwise than alone (relative difference {worst:.1e})"


def _relative_difference(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.double(), theirs.double()
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-30)).item()


def _tolerance(hidden: Tensor) -> float:
    return TOLERANCE.get(hidden.dtype, FP32_TOLERANCE)
