"""The gradient of an embedding in C++ (csrc/cpu/embedding*.cpp), on torch's threads.

Forward is torch's gather, which is at the memory's limit. Backward sorts the tokens by their rows;
then one thread adds up a row's tokens, in their order: the same bits on any number of threads.
"""

import torch
from torch import Tensor

from fasttrain_kernels import native
from fasttrain_kernels.ops.embedding import reference
from fasttrain_kernels.ops.embedding.reference import Problem

SERVED = (torch.float32, torch.float64, torch.bfloat16)


def unsupported(problem: Problem) -> str | None:
    """The reason why the C++ kernel can't serve `problem`, or None."""
    return native.cpu_why_not(problem.device, problem.dtype, SERVED)


def forward(ids: Tensor, weight: Tensor) -> Tensor:
    """As reference.forward, of ids that are rows: op.py has looked."""
    return weight.index_select(0, ids)


def backward(dy: Tensor, ids: Tensor, rows: int, padding_idx: int) -> Tensor:
    """As reference.backward."""
    owners, tokens = torch.sort(reference.owners(ids, rows, padding_idx), stable=True)
    dweight = dy.new_empty(rows, dy.shape[1])
    torch.ops.fasttrain_native.embedding_backward(dy, owners, tokens, dweight)
    return dweight
