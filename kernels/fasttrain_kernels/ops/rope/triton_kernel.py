# Triton takes annotations for types of its own, so kernels carry none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"
"""Rotary position embedding in Triton, for CUDA devices from compute capability 8.0.

A program turns all heads of a token, queries and keys, so that its row of the table is loaded once.
The backward pass of a norm has a fixed number of programs that walk over tokens; each keeps its
share of the weights' gradients in registers and writes it once, so that no atomics are needed.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttrain_kernels import launcher
from fasttrain_kernels.checks import short
from fasttrain_kernels.ops.rope.reference import Problem
from fasttrain_kernels.ops.rope.triton_heads import backward_side, load_angles, turn_side

# One head must fit a program's registers; the widest in use have 512 elements.
MAX_HEAD_DIM = 1024
# Elements of a block of heads, and how many of them a thread has. The backward pass holds blocks of
# gradients, of inputs and of shares, and spills at 16.
FORWARD_BLOCK, FORWARD_ELEMENTS = 4096, 32
BACKWARD_BLOCK, BACKWARD_ELEMENTS = 1024, 8
INTERPRETED_PROGRAMS = 2  # the interpreter is slow; more than one is a test


@triton.jit
def forward_kernel(
    q_ptr,  # None: no queries
    k_ptr,  # None: no keys
    q_out_ptr,
    k_out_ptr,
    q_weight_ptr,  # None: no norm
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    q_heads,
    k_heads,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    cos_stride,
    sin_stride,
    eps,
    DIRECTION: tl.constexpr,  # 1.0, or -1.0 for the opposite angles
    OFFSET: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_Q_HEADS: tl.constexpr,
    BLOCK_K_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    token = tl.cast(tl.program_id(0), tl.int64)
    cos, sin = load_angles(cos_ptr, sin_ptr, token, cos_stride, sin_stride, HALF, BLOCK_HALF)
    sin = sin * DIRECTION
    if q_ptr is not None:
        turn_side(
            q_ptr,
            q_out_ptr,
            q_weight_ptr,
            token,
            cos,
            sin,
            q_heads,
            q_token_stride,
            q_head_stride,
            eps,
            OFFSET,
            NEIGHBOURS,
            HEAD_DIM,
            HALF,
            BLOCK_Q_HEADS,
            BLOCK_HALF,
            BLOCK_REST,
        )
    if k_ptr is not None:
        turn_side(
            k_ptr,
            k_out_ptr,
            k_weight_ptr,
            token,
            cos,
            sin,
            k_heads,
            k_token_stride,
            k_head_stride,
            eps,
            OFFSET,
            NEIGHBOURS,
            HEAD_DIM,
            HALF,
            BLOCK_K_HEADS,
            BLOCK_HALF,
            BLOCK_REST,
        )


@triton.jit
def norm_backward_kernel(
    q_grad_ptr,  # None: nothing is wanted of the queries
    k_grad_ptr,
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    dq_ptr,  # None: not wanted
    dk_ptr,
    q_share_ptr,  # (programs, head_dim) float32; None: dw not wanted
    k_share_ptr,
    cos_ptr,
    sin_ptr,
    tokens,
    q_heads,
    k_heads,
    q_grad_token_stride,
    q_grad_head_stride,
    k_grad_token_stride,
    k_grad_head_stride,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    cos_stride,
    sin_stride,
    eps,
    OFFSET: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_Q_HEADS: tl.constexpr,
    BLOCK_K_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    at = tl.program_id(0) * HEAD_DIM
    if q_grad_ptr is not None:
        backward_side(
            q_grad_ptr,
            q_ptr,
            q_weight_ptr,
            dq_ptr,
            None if q_share_ptr is None else q_share_ptr + at,
            cos_ptr,
            sin_ptr,
            tokens,
            q_heads,
            q_grad_token_stride,
            q_grad_head_stride,
            q_token_stride,
            q_head_stride,
            cos_stride,
            sin_stride,
            eps,
            OFFSET,
            NEIGHBOURS,
            HEAD_DIM,
            HALF,
            BLOCK_Q_HEADS,
            BLOCK_HALF,
            BLOCK_REST,
        )
    if k_grad_ptr is not None:
        backward_side(
            k_grad_ptr,
            k_ptr,
            k_weight_ptr,
            dk_ptr,
            None if k_share_ptr is None else k_share_ptr + at,
            cos_ptr,
            sin_ptr,
            tokens,
            k_heads,
            k_grad_token_stride,
            k_grad_head_stride,
            k_token_stride,
            k_head_stride,
            cos_stride,
            sin_stride,
            eps,
            OFFSET,
            NEIGHBOURS,
            HEAD_DIM,
            HALF,
            BLOCK_K_HEADS,
            BLOCK_HALF,
            BLOCK_REST,
        )


def unsupported(problem: Problem) -> str | None:
    """The reason why the Triton kernel can't serve `problem`, or None."""
    interpreted = not isinstance(forward_kernel, triton.JITFunction)
    if (reason := launcher.why_not_on(problem.device, interpreted=interpreted)) is not None:
        return reason
    if problem.dtype == torch.float64:
        return f"computes in float32, not {short(problem.dtype)}"
    if problem.head_dim > MAX_HEAD_DIM:
        return f"holds heads of up to {MAX_HEAD_DIM} elements; these have {problem.head_dim}"
    return None


def forward_blocks(
    q_heads: int, k_heads: int, head_dim: int, half: int
) -> tuple[dict[str, int], int]:
    """Sizes of the forward kernel's blocks, and the warps that share one."""
    return _blocks(q_heads, k_heads, head_dim, half, FORWARD_BLOCK, FORWARD_ELEMENTS)


def backward_blocks(
    q_heads: int, k_heads: int, head_dim: int, half: int
) -> tuple[dict[str, int], int]:
    """The same of the norm's backward kernel."""
    return _blocks(q_heads, k_heads, head_dim, half, BACKWARD_BLOCK, BACKWARD_ELEMENTS)


@functools.cache
def _blocks(
    q_heads: int, k_heads: int, head_dim: int, half: int, most: int, per_thread: int
) -> tuple[dict[str, int], int]:
    block_half, rest = triton.next_power_of_2(half), head_dim - 2 * half
    block_rest = triton.next_power_of_2(rest) if rest > 0 else 0
    elements = 2 * block_half + block_rest

    fitting = 1 << (max(1, most // elements).bit_length() - 1)  # a power of two

    def block_heads(heads: int) -> int:
        return min(triton.next_power_of_2(max(1, heads)), fitting)

    sizes = {
        "HEAD_DIM": head_dim,
        "HALF": half,
        "BLOCK_Q_HEADS": block_heads(q_heads),
        "BLOCK_K_HEADS": block_heads(k_heads),
        "BLOCK_HALF": block_half,
        "BLOCK_REST": block_rest,
    }
    warps = triton.cdiv(block_heads(max(q_heads, k_heads)) * elements, 32 * per_thread)
    return sizes, min(8, triton.next_power_of_2(warps))


@functools.cache
def _resident_programs(device: torch.device, warps: int) -> int:
    """How many programs of the norm's backward pass run at once: 16 warps a multiprocessor."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count * (16 // warps)


def forward(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    norm_style: str,
    style: str,
) -> tuple[Tensor, Tensor]:
    """As reference.forward."""
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if q_norm is not None and k_norm is not None:
        q_norm, k_norm = q_norm.contiguous(), k_norm.contiguous()
    _turn((q, k), (q_out, k_out), (q_norm, k_norm), (cos, sin), eps, norm_style, style, 1.0)
    return q_out, k_out


def _turn(
    xs: tuple[Tensor | None, Tensor | None],
    outs: tuple[Tensor, Tensor],
    weights: tuple[Tensor | None, Tensor | None],
    table: tuple[Tensor, Tensor],
    eps: float,
    norm_style: str,
    style: str,
    direction: float,
) -> None:
    """Launches forward_kernel; sides that are None are left out."""
    cos, sin = table
    tokens, half = cos.shape
    head_dim = next(x for x in xs if x is not None).shape[2]
    if tokens == 0:
        return
    sizes, warps = forward_blocks(_heads(xs[0]), _heads(xs[1]), head_dim, half)
    with torch.cuda.device_of(cos):
        forward_kernel[(tokens,)](
            *xs,
            *outs,
            *weights,
            cos,
            sin,
            *map(_heads, xs),
            *_strides(xs[0]),
            *_strides(xs[1]),
            cos.stride(0),
            sin.stride(0),
            eps,
            DIRECTION=direction,
            OFFSET=1.0 if norm_style == "gemma" else 0.0,
            NEIGHBOURS=style == "interleaved",
            **sizes,
            num_warps=warps,
        )


def backward(
    dq: Tensor | None,
    dk: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    norm_style: str,
    style: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As reference.backward."""
    dq = dq if needs[0] or needs[2] else None
    dk = dk if needs[1] or needs[3] else None
    some = dk if dq is None else dq
    assert some is not None
    dq_in = some.new_empty(dq.shape if dq is not None and needs[0] else 0)
    dk_in = some.new_empty(dk.shape if dk is not None and needs[1] else 0)
    if q is None or k is None or q_norm is None or k_norm is None:
        outs = dq_in, dk_in
        _turn((dq, dk), outs, (None, None), (cos, sin), eps, norm_style, style, -1.0)
        return dq_in, dk_in, some.new_empty(0), some.new_empty(0)
    tokens, half = cos.shape
    sizes, warps = backward_blocks(q.shape[1], k.shape[1], q.shape[2], half)
    programs = min(tokens, _resident_programs(some.device, warps))
    shares = [
        cos.new_empty(programs, q.shape[2], dtype=torch.float32) if needed else None
        for needed in needs[2:]
    ]
    if tokens > 0:
        with torch.cuda.device_of(some):
            norm_backward_kernel[(programs,)](
                dq,
                dk,
                q,
                k,
                q_norm.contiguous(),
                k_norm.contiguous(),
                dq_in if needs[0] else None,
                dk_in if needs[1] else None,
                *shares,
                cos,
                sin,
                tokens,
                q.shape[1],
                k.shape[1],
                *_strides(dq),
                *_strides(dk),
                *_strides(q),
                *_strides(k),
                cos.stride(0),
                sin.stride(0),
                eps,
                OFFSET=1.0 if norm_style == "gemma" else 0.0,
                NEIGHBOURS=style == "interleaved",
                **sizes,
                num_warps=warps,
            )
    dq_norm, dk_norm = (
        some.new_empty(0) if share is None else share.sum(0).to(weight.dtype)
        for share, weight in zip(shares, (q_norm, k_norm), strict=True)
    )
    return dq_in, dk_in, dq_norm, dk_norm


def _heads(x: Tensor | None) -> int:
    return 0 if x is None else x.shape[1]


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))
