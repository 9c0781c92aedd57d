"""Finds the decoder layers of a model, whatever its architecture calls them."""

from __future__ import annotations

from torch import nn

from fasttrain.config.errors import Problem, UserError
from fasttrain.model.language_model import HFLanguageModel


def decoder_layers(model: HFLanguageModel, *, key: str) -> list[nn.Module]:
    """The layers in order: the first list of modules that has as many as the config says.

    UserError naming `key`, the transform that needs them, where there is no such list.
    """
    count = model.causal_lm.config.get_text_config().num_hidden_layers
    for module in model.causal_lm.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    what = f"no list of {count} layers was found in {type(model.causal_lm).__name__}."
    raise UserError(Problem(key=key, what=what, hint="Leave this transform out."))
