"""An embedding as PyTorch sees it: two opaque ops, a thin autograd function, `embedding`.

The ops look at ids where that costs no wait, which a compiled graph can't, but runs.
"""

from typing import Any

import torch
from torch import Tensor

from fasttrain_kernels import checks, settings
from fasttrain_kernels.dispatch import Op
from fasttrain_kernels.ops.embedding.reference import NO_PADDING, Problem
from fasttrain_kernels.problem import rounded
from fasttrain_kernels.registry import Candidate
from fasttrain_kernels.settings import AUTO

FOLDER = "fasttrain_kernels.ops.embedding"
NAME = "embedding"


def describe(
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    width: int,
    vocabulary: int = 0,
    rows: int = 0,
) -> Problem:
    """The problem of `rows` ids and a table of `vocabulary` rows of `width` elements."""
    return Problem(torch.device(device), dtype, width, vocabulary, rounded(rows))


EMBEDDING = Op(
    NAME,
    candidates=(
        Candidate("triton", f"{FOLDER}.triton_kernel", devices=("cuda",)),
        Candidate("cpu", f"{FOLDER}.cpu_kernel", devices=("cpu",)),
    ),
    folder=FOLDER,
    describe=describe,
    example={"width": 4096, "vocabulary": 32000},
)

library = torch.library.Library("fasttrain", "FRAGMENT")
library.define("embedding_forward(Tensor ids, Tensor weight, str backend) -> Tensor")
# rows: of the table. padding_idx: -1 for none.
library.define(
    "embedding_backward(Tensor dy, Tensor ids, SymInt rows, SymInt padding_idx, str backend) "
    "-> Tensor"
)


def _forward(ids: Tensor, weight: Tensor, backend: str) -> Tensor:
    _check_ids(ids, weight.shape[0])
    flat = ids.reshape(-1)
    y: Tensor = EMBEDDING.run(
        "forward",
        _problem(weight, weight.shape[0], flat),
        backend,
        lambda kernel: kernel.forward(flat, weight),
    )
    # No view for autograd, which forbids `y *= 2` on a view that a custom function returns.
    return torch.ops.aten._unsafe_view(y, (*ids.shape, weight.shape[1]))


def _backward(dy: Tensor, ids: Tensor, rows: int, padding_idx: int, backend: str) -> Tensor:
    flat, dy_rows = ids.reshape(-1), checks.rows(dy)
    dweight: Tensor = EMBEDDING.run(
        "backward",
        _problem(dy, rows, flat),
        backend,
        lambda kernel: kernel.backward(dy_rows, flat, rows, padding_idx),
    )
    return dweight


def _problem(rows: Tensor, vocabulary: int, ids: Tensor) -> Problem:
    width = rows.shape[-1]
    return Problem(rows.device, rows.dtype, width, vocabulary, rounded(ids.shape[0]))


def _forward_fake(ids: Tensor, weight: Tensor, backend: str) -> Tensor:
    return weight.new_empty(*ids.shape, weight.shape[1])


def _backward_fake(dy: Tensor, ids: Tensor, rows: int, padding_idx: int, backend: str) -> Tensor:
    return dy.new_empty(rows, dy.shape[-1])


library.impl("embedding_forward", _forward, "CompositeExplicitAutograd")
library.impl("embedding_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("fasttrain::embedding_forward", _forward_fake, lib=library)
torch.library.register_fake("fasttrain::embedding_backward", _backward_fake, lib=library)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding_idx: int, backend: str) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.padding_idx, ctx.backend = weight.shape[0], padding_idx, backend
        y: Tensor = torch.ops.fasttrain.embedding_forward(ids, weight, backend)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor, None, None]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(f"{NAME} is differentiable once: create_graph=True is not served")
        (ids,) = ctx.saved_tensors
        dweight = torch.ops.fasttrain.embedding_backward(
            dy, ids, ctx.rows, ctx.padding_idx, ctx.backend
        )
        return None, dweight, None, None


def _check_ids(ids: Tensor, rows: int) -> None:
    """IndexError that names the first id which is no row, where ids can be looked at."""
    if ids.numel() == 0 or not (ids.device.type == "cpu" or settings.checked()):
        return
    least, most = (int(bound) for bound in ids.aminmax())
    if least < 0 or most >= rows:
        flat = ids.reshape(-1)
        position = int(((flat < 0) | (flat >= rows)).nonzero()[0])
        raise IndexError(
            f"{NAME}: id {int(flat[position])} at position {position} is none of the {rows} rows "
            "of weight"
        )


def _check(ids: Tensor, weight: Tensor, padding_idx: int | None) -> None:
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"{NAME}: weight {tuple(weight.shape)} must be (V, H), neither of them 0")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{NAME}: ids are {checks.short(ids.dtype)}; expected int64 or int32")
    checks.floating(NAME, weight=weight)
    checks.same_device(NAME, ids=ids, weight=weight)
    rows = weight.shape[0]
    if padding_idx is not None and not -rows <= padding_idx < rows:
        raise ValueError(
            f"{NAME}: padding_idx={padding_idx}; expected {-rows} to {rows - 1}, for weight "
            f"{tuple(weight.shape)}"
        )


def embedding(
    ids: Tensor, weight: Tensor, *, padding_idx: int | None = None, backend: str = AUTO
) -> Tensor:
    """Rows of weight by their numbers: weight[ids].

    ids (...) int64 or int32, weight (V, H) -> y (..., H) of weight's dtype. The gradient of weight
    is dense, (V, H): that of one row is added up in float32 (float64 for float64) in a fixed order
    and rounded once, without atomics, so that it is the same bits every time. torch's own adds
    bfloat16 in bfloat16 on a CPU. A weight that is also the head's gets both gradients.

    padding_idx: the row that gets no gradient, counted from the end if negative, as in torch.

    An id that is none of the V rows is an IndexError on a CPU, and on a GPU where it is waited for,
    `use(checked=True)`. Otherwise, on a GPU, that token's y is NaN, and the backward pass leaves it
    out; nothing outside of weight is read or written.

    backend: "auto", or the name of one that must serve ("triton", "cpu", "eager"); `use()` and
    FASTTRAIN_KERNELS go before it. Differentiable once.

    Raises ValueError for shapes, dtypes or devices that don't fit, UnsupportedKernel where the
    backend asked for can't serve. Formulas: ops/embedding/reference.py.
    """
    _check(ids, weight, padding_idx)
    if padding_idx is None:
        padding_idx = NO_PADDING
    elif padding_idx < 0:
        padding_idx += weight.shape[0]
    y: Tensor = _Embedding.apply(ids, weight, padding_idx, backend)
    return y
