"""Attention layers that call what transformers' table of attention functions has for them.

In a model that runs on packed documents that is our function (model/packed_attention.py), which
asks the layer that calls it for a backend.
"""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import nn

from fasttrain.core.batch import BatchProfile
from fasttrain.model.language_model import HFLanguageModel
from fasttrain.model.packed_attention import BACKEND
from fasttrain.model.transforms.sites.site import NotASite

TABLE = "ALL_ATTENTION_FUNCTIONS"
DROPOUTS = ("attention_dropout", "attn_dropout", "dropout")  # of weights, as layers name theirs


@dataclass(frozen=True)
class AttentionSite:
    """An attention layer, and what is known of its calls before any is made."""

    op: ClassVar[str] = "packed_attention"
    path: str
    head_dim: int
    value_dim: int
    query_heads: int
    key_heads: int
    window: bool
    softcap: bool
    sinks: bool

    def facts(self, profile: BatchProfile) -> dict[str, Any]:
        facts = asdict(self)
        del facts["path"]
        facts["rows"] = profile.tokens
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
    for name in DROPOUTS:
        dropout = getattr(module, name, 0.0)
        dropout = dropout.p if isinstance(dropout, nn.Dropout) else dropout
        if isinstance(dropout, float) and dropout > 0:
            return f"it drops attention weights ({name} {dropout}), which no kernel does"
    return None


def _site(path: str, module: nn.Module, config: Any) -> AttentionSite:
    """Sizes as transformers names them, which are the same in nearly every architecture."""

    def named(*names: str) -> Any:
        found = (getattr(module, name, None) for name in names)
        return next((value for value in found if value is not None), None)

    query_heads = config.num_attention_heads
    head_dim = named("qk_head_dim", "head_dim") or config.hidden_size // query_heads
    window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    return AttentionSite(
        path,
        head_dim=head_dim,
        value_dim=named("v_head_dim") or head_dim,
        query_heads=query_heads,
        key_heads=getattr(config, "num_key_value_heads", None) or query_heads,
        window=window is not None,
        softcap=named("attn_logit_softcapping") is not None,
        sinks=hasattr(module, "sinks"),
    )
