"""liger-kernel's RMS norm: Llama's and Gemma's, of rows and weights of one dtype."""

from torch import Tensor

from fasttrain_kernels import liger
from fasttrain_kernels.checks import short
from fasttrain_kernels.ops.rms_norm.reference import Problem

OFFSET = {"llama": 0.0, "gemma": 1.0}  # what is added to the weight
MODE = {"llama": 0, "gemma": 1}  # where it rounds
FUNCTIONS = {
    "rms_norm_forward": ("X", "W", "eps", "offset", "casting_mode", "row_mode"),
    "rms_norm_backward": (
        *("dY", "X", "W", "RSTD", "offset", "casting_mode"),
        *("BLOCK_SIZE", "num_warps", "in_place", "row_mode"),
    ),
}


def unsupported(problem: Problem) -> str | None:
    """The reason why liger-kernel can't serve `problem`, or None."""
    if problem.style not in OFFSET:
        return f"knows {', '.join(OFFSET)}, not {problem.style}"
    if problem.residual_dtype is not None:
        return "adds no residual"
    if problem.dtype != problem.weight_dtype:
        dtypes = f"{short(problem.dtype)}, not {short(problem.weight_dtype)}"
        return f"wants weights of the rows' dtype, {dtypes}"
    return liger.why_not(problem.device, problem.dtype, problem.width, "rms_norm", FUNCTIONS)


def forward(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, style: str
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.forward."""
    run = liger.get("rms_norm", "rms_norm_forward")
    offset, mode = OFFSET[style], MODE[style]
    y, _, rstd, *_ = run(x.contiguous(), weight.contiguous(), eps, offset, mode, None)
    return y, x.new_empty(0), rstd


def backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    style: str,
    needs_dx: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """As reference.backward."""
    block, warps = liger.get("utils", "calculate_settings")(x.shape[1])
    dx, dweight = liger.get("rms_norm", "rms_norm_backward")(
        dy.contiguous(),
        x.contiguous(),
        weight.contiguous(),
        rstd,
        OFFSET[style],
        MODE[style],
        block,
        warps,
        False,  # dy is not its to write to
        None,
    )
    return dx if needs_dx else x.new_empty(0), dweight if needs_dweight else weight.new_empty(0)
