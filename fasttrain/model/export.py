"""Writes a model as plain transformers would, so that plain transformers reads it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fasttrain.model.quiet import quiet_transformers


def save_causal_lm(causal_lm: PreTrainedModel, directory: Path, dtype: torch.dtype | None) -> None:
    """config.json, generation_config.json and safetensors, the weights in `dtype` (None: as is)."""
    state = causal_lm.state_dict() if dtype is None else cast(causal_lm.state_dict(), dtype)
    with quiet_transformers():
        causal_lm.save_pretrained(directory, state_dict=state)
    if dtype is not None and dtype != causal_lm.dtype:
        # save_pretrained notes the dtype of the live weights, not of those written.
        config = type(causal_lm.config).from_pretrained(directory)
        config.dtype = dtype
        config.save_pretrained(directory)


def cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating-point tensors in `dtype`. Names that share memory go on sharing it: that is how a
    tied weight is known and written once."""
    casted: dict[tuple[int, torch.Size], Tensor] = {}
    result = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in casted:
            casted[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        result[name] = casted[key]
    return result
