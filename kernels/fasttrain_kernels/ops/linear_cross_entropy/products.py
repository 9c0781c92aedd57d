"""The products of the fused head, by PyTorch's own matrix multiplication, and where they go."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from fasttrain_kernels.ops.cross_entropy.reference import compute_dtype


@dataclass(frozen=True)
class Backend:
    """How the fused head runs on one kind of device.

    The budgets depend on the device alone: what changes from call to call, such as free memory,
    would change the chunks and with them the roundings.
    """

    kernel: ModuleType  # of ../cross_entropy: what it does to rows of logits
    narrow_products: bool  # multiplies bfloat16 and float16 as they are; else in float32
    efficient_rows: int  # of a chunk by rows: with more, adding up dright hardly gets cheaper
    chunk_bytes: Callable[[torch.device], int]  # at most, for the logits of a chunk by rows
    panel_bytes: Callable[[torch.device], int]  # at most, for the logits of a panel of classes

    def product_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of operands and logits, where the caller asked for `dtype`."""
        return dtype if self.narrow_products else compute_dtype(dtype)


def gpu_backend(kernel: ModuleType) -> Backend:
    """On a GPU: products of cuBLAS, rows by `kernel`. Both budgets are 2 GiB, or 1/32 of the memory
    of a small card; by rows that is 8192 of 128k bfloat16 logits, which is where adding up dright
    costs 3 % of the products on an H200."""

    def budget(device: torch.device) -> int:
        if device.type != "cuda":  # Triton's interpreter
            return 2**20
        return min(2**31, torch.cuda.get_device_properties(device).total_memory // 32)

    return Backend(
        kernel, narrow_products=True, efficient_rows=8192, chunk_bytes=budget, panel_bytes=budget
    )


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a @ b, or out += a @ b, into any dtype of `out`."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif a.is_cuda and out.dtype == torch.float32:
        if not add:
            torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
        elif _adds_to_float32(a.device, a.dtype):
            torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
        else:
            out.add_(torch.ops.aten.mm.dtype(a, b, out.dtype))
    else:
        # Rounded once, to `out`: the operands are float32, or are made so.
        wide = compute_dtype(a.dtype)
        result = a.to(wide) @ b.to(wide)
        out.add_(result) if add else out.copy_(result)


@functools.cache
def _adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of narrow operands to a float32 sum in one pass: some
    releases since 2.8, which brought such products, want the sum in the operands' dtype. Asked once
    a process, which waits for the device."""
    operand = torch.ones(8, 8, dtype=dtype, device=device)
    total = torch.ones(8, 8, dtype=torch.float32, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(total, operand, operand, total.dtype, out=total)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return bool((total == 9).all())


def make_logits(
    lefts: Sequence[Tensor], rights: Sequence[Tensor], bias: Tensor | None, out: Tensor
) -> Tensor:
    """The sum over pairs of left @ right.T, + bias; all of out's dtype."""
    if bias is None:
        torch.mm(lefts[0], rights[0].T, out=out)
    else:
        torch.addmm(bias, lefts[0], rights[0].T, out=out)
    for left, right in zip(lefts[1:], rights[1:], strict=True):
        torch.addmm(out, left, right.T, out=out)
    return out


def taken(tensor: Tensor, rows: Tensor | None, part: slice, dtype: torch.dtype) -> Tensor:
    """A part of the rows that count, in `dtype`."""
    found = tensor[part] if rows is None else tensor.index_select(0, rows[part])
    return found.to(dtype)


class RowGradient:
    """The gradient of a left factor (N, K): a product for each part of the rows that count."""

    def __init__(self, left: Tensor, rows: Tensor | None) -> None:
        make = torch.empty if rows is None else torch.zeros
        self.gradient = make(left.shape, dtype=left.dtype, device=left.device)
        self.rows = rows

    def put(self, part: slice, dlogits: Tensor, right: Tensor) -> None:
        if self.rows is None:
            product(dlogits, right, self.gradient[part])
        else:
            found = self.gradient.new_empty(dlogits.shape[0], right.shape[1])
            product(dlogits, right, found)
            self.gradient.index_copy_(0, self.rows[part], found)


class ClassGradient:
    """The gradient of a right factor (V, K): the sum of a product for each chunk of rows."""

    def __init__(self, right: Tensor, dtype: torch.dtype, single: bool) -> None:
        """`dtype`: of the operands. `single`: there is one chunk, whose product is the sum."""
        summed = right.dtype if single else compute_dtype(dtype)
        self.sum = torch.empty(right.shape, dtype=summed, device=right.device)
        self.dtype, self.empty = right.dtype, True

    def add(self, dlogits: Tensor, left: Tensor) -> None:
        product(dlogits.T, left, self.sum, add=not self.empty)
        self.empty = False

    def result(self) -> Tensor:
        return (self.sum.zero_() if self.empty else self.sum).to(self.dtype)
