"""What benchmarks compare with: classes of liger-kernel, and peers of the fused head.

Each `..._head()` returns a function (hidden, weight, labels, softcap, reduction) -> loss, or raises
Absent where it can't run.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Absent
from bench.ops.heads import IGNORE_INDEX, logits_of

HeadLoss = Callable[[Tensor, Tensor, Tensor, float | None, str], Tensor]

# Ways of cut-cross-entropy: the first leaves no small gradients out, the second only of the hidden
# states. The build on PyPI has neither, but can be told not to filter.
CUT_EXACT = ("cce_exact", "cce_kahan_full_c")


def eager(
    hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None, reduction: str
) -> Tensor:
    return F.cross_entropy(logits_of(hidden, weight, softcap), labels, reduction=reduction)


def compiled_head() -> HeadLoss:
    torch._dynamo.reset()
    return torch.compile(eager)


def builtin_head(chunked: bool) -> HeadLoss:
    """F.linear_cross_entropy; chunked with the options that it chooses itself."""
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise Absent(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None

    def call(
        hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None, reduction: str
    ) -> Tensor:
        if softcap is not None:
            raise Absent("F.linear_cross_entropy has no softcap")
        return function(hidden, weight, labels, reduction=reduction, options=options)

    return call


def liger_head(accum_dtype: torch.dtype | None = None) -> HeadLoss:
    function = liger("LigerFusedLinearCrossEntropyFunction")

    def call(
        hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None, reduction: str
    ) -> Tensor:
        options = (None, None, IGNORE_INDEX, 0.0, 0.0, reduction, softcap, False, accum_dtype)
        return function.apply(hidden, weight, labels, *options)[0]

    return call


def liger(name: str) -> Any:
    """A class of liger-kernel, as it chooses it for this device."""
    try:
        import liger_kernel.ops
    except ImportError as error:
        raise Absent(f"liger-kernel: {error}") from error
    if not torch.cuda.is_available():
        raise Absent("liger-kernel runs on GPUs")
    return getattr(liger_kernel.ops, name)


def cut_heads() -> dict[str, Callable[[], HeadLoss]]:
    """The ways of cut-cross-entropy by name, which says what is exact about them."""
    try:
        ways = [way.name.lower() for way in cut().LinearCrossEntropyImpl]
    except Exception:  # whatever it is, the row says it: asked for again, it fails again
        return {"cut-cross-entropy": cut_head}
    exact = next((way for way in CUT_EXACT if way in ways), None)
    unfiltered = {"impl": "cce", "filter_eps": None} if exact is None else {"impl": exact}
    return {
        f"cut-cross-entropy {exact or 'unfiltered'}": lambda: cut_head(**unfiltered),
        "cut-cross-entropy filtered": lambda: cut_head(impl="cce"),
    }


def cut() -> Any:
    try:
        import cut_cross_entropy
    except ImportError as error:
        raise Absent(f"cut-cross-entropy: {error}") from error
    if not torch.cuda.is_available():
        raise Absent("cut-cross-entropy runs on GPUs")
    return cut_cross_entropy


def cut_head(**options: Any) -> HeadLoss:
    function = cut().linear_cross_entropy

    def call(
        hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None, reduction: str
    ) -> Tensor:
        return function(hidden, weight, labels, softcap=softcap, reduction=reduction, **options)

    return call
