"""Log-probabilities of labels, per token or summed over documents, from their definition.

    log_prob_i = log softmax(logits_i)[label_i], logits as ../linear_cross_entropy/reference.py
    of document d: the sum over i in [cu_seqlens_d, cu_seqlens_{d+1}) of log_prob_i

A log-probability is a cross-entropy with its sign turned, so the backends are those of
linear_cross_entropy: of every backend there, forward and backward serve here.
"""

import torch
from torch import Tensor

from fasttrain_kernels.ops.linear_cross_entropy.reference import backward, forward, unsupported

__all__ = ["backward", "document_sums", "forward", "unsupported"]


def document_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """values (N,), cu_seqlens (D + 1,) -> (D,): the sum over each document; 0 for an empty one.

    In float64, in an order that is fixed: repeatable, and no document's sum depends on another's.
    Nothing outside values is read, whatever cu_seqlens holds.
    """
    offsets = cu_seqlens.long().clamp(0, values.shape[0])
    sums = torch.segment_reduce(values.double(), "sum", offsets=offsets, unsafe=True, initial=0)
    return sums.to(values.dtype)
