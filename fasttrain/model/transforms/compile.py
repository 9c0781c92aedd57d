"""torch.compile on each decoder layer.

Layer by layer, since all layers share one graph: compiling takes as long as for one layer, where
the whole model would take as long as all. Kernels are opaque to it and stay in the graph. Attention
without a kernel stays outside: it makes a call for each document, whose number changes.
"""

from __future__ import annotations

import torch

from fasttrain.config.schema.model import CompileConfig
from fasttrain.core.interfaces import LanguageModel, Transform
from fasttrain.core.kernel_plan import KernelPlan
from fasttrain.model.language_model import HFLanguageModel
from fasttrain.model.layers import decoder_layers
from fasttrain.model.transforms.activation_checkpoint import INNER


class CompileTransform(Transform):
    """Compiles in place: names of parameters stay as they are."""

    Config = CompileConfig

    def apply(self, model: LanguageModel, *, plan: KernelPlan) -> LanguageModel:
        assert isinstance(model, HFLanguageModel)
        options = {"mode": self.config.mode, "dynamic": self.config.dynamic}
        for layer in decoder_layers(model, key="model.transforms.compile"):
            if hasattr(layer, INNER):
                # Inside of the checkpoint: around it, Dynamo may find attention that it must not
                # compile within a region that it can only compile whole, and compiles nothing.
                setattr(layer, INNER, torch.compile(getattr(layer, INNER), **options))
            else:
                layer.compile(**options)
        return model
