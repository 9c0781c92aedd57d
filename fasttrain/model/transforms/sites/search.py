"""Every op that has sites in models, in the order of the kernel table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from fasttrain.model.transforms.sites.embedding import EmbeddingSite, find_embeddings
from fasttrain.model.transforms.sites.gated import (
    GegluSite,
    SwigluSite,
    find_geglu,
    find_swiglu,
)
from fasttrain.model.transforms.sites.head import HeadSite, find_heads
from fasttrain.model.transforms.sites.packed_attention import AttentionSite, find_attention
from fasttrain.model.transforms.sites.rms_norm import NormSite, find_rms_norms
from fasttrain.model.transforms.sites.rope import RopeSite, find_rope
from fasttrain.model.transforms.sites.site import NotASite, Site


@dataclass(frozen=True)
class Search:
    """How the sites of one op are found, and what they are called."""

    op: str
    what: str
    find: Callable[[nn.Module], tuple[Sequence[Site], Sequence[NotASite]]]


SEARCHES = (
    Search(NormSite.op, "RMS norm", find_rms_norms),
    Search(AttentionSite.op, "attention over packed documents", find_attention),
    Search(RopeSite.op, "rotary position embedding", find_rope),
    Search(SwigluSite.op, "MLP gated by SiLU", find_swiglu),
    Search(GegluSite.op, "MLP gated by GELU", find_geglu),
    Search(EmbeddingSite.op, "token embedding", find_embeddings),
    Search(HeadSite.op, "output layer to fuse with the loss", find_heads),
)
