"""Activation checkpointing: a layer keeps its input only and runs again in backward.

Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016), arXiv 1604.06174.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fasttrain.config.schema.model import ActivationCheckpointConfig
from fasttrain.core.interfaces import LanguageModel, Transform
from fasttrain.core.kernel_plan import KernelPlan
from fasttrain.model.language_model import HFLanguageModel
from fasttrain.model.layers import decoder_layers

INNER = "forward_run_again"  # the layer's own forward, compiled where the layer is to be compiled


class ActivationCheckpointTransform(Transform):
    """Checkpoints the first of every `every_layers` layers. Gradients stay what they were."""

    Config = ActivationCheckpointConfig

    def apply(self, model: LanguageModel, *, plan: KernelPlan) -> LanguageModel:
        assert isinstance(model, HFLanguageModel)
        layers = decoder_layers(model, key="model.transforms.activation_checkpoint")
        for layer in layers[:: self.config.every_layers]:
            setattr(layer, INNER, layer.forward)
            layer.forward = MethodType(_run_again_in_backward, layer)
        return model


def _run_again_in_backward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    run = getattr(layer, INNER)
    if not torch.is_grad_enabled():
        return run(*args, **kwargs)
    return checkpoint(run, *args, use_reentrant=False, **kwargs)
