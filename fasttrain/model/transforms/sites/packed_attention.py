"""Attention layers that call what transformers' table of attention functions has for them.

In a model that runs on packed documents that is our function (model/packed_attention.py), which
asks the layer that calls it for a backend.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from fasttrain.core.batch import BatchProfile
from fasttrain.model.language_model import HFLanguageModel
from fasttrain.model.packed_attention import BACKEND
from fasttrain.model.transforms.sites.site import NotASite

TABLE = "ALL_ATTENTION_FUNCTIONS"


@dataclass(frozen=True)
class AttentionSite:
    """An attention layer, and what is known of its calls before any is made."""

    op: ClassVar[str] = "packed_attention"
    path: str
    head_dim: int
    query_heads: int
    key_heads: int
    window: bool
    softcap: bool
    sinks: bool

    def facts(self, profile: BatchProfile) -> dict[str, Any]:
        names = ("head_dim", "query_heads", "key_heads", "window", "softcap", "sinks")
        facts = {name: getattr(self, name) for name in names}
        lengths = profile.document_lengths
        if lengths:  # that of the document which a token lies in, on average
            facts["document_length"] = round(sum(n * n for n in lengths) / sum(lengths))
        return facts

    def put(self, model: nn.Module, backend: str) -> None:
        setattr(model.get_submodule(self.path), BACKEND, backend)


def take_out(module: nn.Module) -> None:
    """The inverse of put."""
    vars(module).pop(BACKEND, None)


def find_attention(model: nn.Module) -> tuple[list[AttentionSite], list[NotASite]]:
    """The attention layers of a language model that runs on packed documents."""
    sites: list[AttentionSite] = []
    others: list[NotASite] = []
    if not isinstance(model, HFLanguageModel):
        return sites, others
    config = model.causal_lm.config.get_text_config()
    for path, module in model.named_modules():
        if TABLE not in inspect.unwrap(type(module).forward).__code__.co_names:
            continue
        reason = _why_not(model, module)
        if reason is None:
            sites.append(_site(path, module, config))
        else:
            others.append(NotASite(path, reason))
    return sites, others


def _why_not(model: HFLanguageModel, module: nn.Module) -> str | None:
    if model.separation.kind != "per_document":
        return f"documents are padded rows ({model.separation.reason})"
    dropout = getattr(module, "attention_dropout", 0.0)
    if isinstance(dropout, float) and dropout > 0:
        return f"it drops attention weights (attention_dropout {dropout}), which no kernel does"
    return None


def _site(path: str, module: nn.Module, config: Any) -> AttentionSite:
    """Sizes as transformers names them, which are the same in nearly every architecture."""
    query_heads = config.num_attention_heads
    window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    softcap = getattr(module, "attn_logit_softcapping", None)
    return AttentionSite(
        path,
        getattr(module, "head_dim", None) or config.hidden_size // query_heads,
        query_heads,
        getattr(config, "num_key_value_heads", None) or query_heads,
        window is not None,
        softcap is not None,
        hasattr(module, "sinks"),
    )
