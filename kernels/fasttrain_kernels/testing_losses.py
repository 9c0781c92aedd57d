"""Exact values of the losses in float64, and how far from them a backend may be.

The formulas are written out here once more, so that no code is compared with itself. Errors are
followed through them to first order, in units of the roundoff of the dtype that is computed in
(float32; float64 for float64): of a sum of n terms 2 + sqrt(n) units of the sum of their sizes, of
exp(x - y) 4 units of its value, and 3 more for each unit of |x - y|. Where products have narrow
operands, logits are rounded to their dtype before the softmax, and dlogits before its products.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttrain_kernels.testing import ROUNDOFF, Expected

WIDE = torch.float64
SCALED = 2  # roundings of scale * a: of the scale to float32, and of the product
CAPPED = 12  # of softcap * tanh(scale * a / softcap): 5 of its parts, and a tanh of 3 last places
STORED = 2  # of a gradient: when it is stored, and when it is multiplied by the loss's gradient


class LossOptions(NamedTuple):
    """What a call says beside its tensors; as linear_cross_entropy has it."""

    ignore_index: int = -100
    reduction: str = "mean"
    num_items: Tensor | float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    scale: float = 1.0
    softcap: float | None = None
    token_weights: Tensor | None = None


def cross_entropy_expected(
    logits: Tensor,
    labels: Tensor,
    dloss: Tensor | float = 1.0,
    *,
    truncating: bool = False,
    **options: Any,
) -> dict[str, Expected]:
    """loss, log_probs, entropy and dlogits of cross_entropy; options as in LossOptions.

    dloss: the gradient of the loss, of its shape or one number. `truncating`: the backend rounds
    bfloat16 towards zero, as Triton's interpreter does.
    """
    exact = _exact(logits.reshape(-1, logits.shape[-1]))
    rows = _Rows(exact, labels, dloss, ROUNDOFF[_compute(logits.dtype)], LossOptions(**options))
    stored = _stored(logits.dtype, truncating)
    return rows.outcome() | {"dlogits": _shaped(rows.rounded(stored), logits.shape)}


def linear_cross_entropy_expected(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    dloss: Tensor | float = 1.0,
    *,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    product_dtype: torch.dtype = torch.float32,
    truncating: bool = False,
    **options: Any,
) -> dict[str, Expected]:
    """loss, log_probs, entropy, dhidden, dweight, dbias, dinner and douter of linear_cross_entropy.

    product_dtype: of the operands that the backend multiplies; the tensors must hold what it has
    made of them. The other arguments: as cross_entropy_expected.
    """
    unit = ROUNDOFF[_compute(hidden.dtype)]
    narrow = 0.0 if product_dtype in (torch.float32, WIDE) else ROUNDOFF[product_dtype]
    named = {"hidden": hidden, "weight": weight}
    if adapter is not None:
        named |= {"inner": adapter[0], "outer": adapter[1]}
    factors = {name: t.detach().cpu().to(WIDE).flatten(0, -2) for name, t in named.items()}
    start = torch.zeros(()) if bias is None else bias.detach().cpu().to(WIDE)
    logits = Expected(start, torch.zeros(()))
    pairs = [("hidden", "weight"), ("inner", "outer")][: len(factors) // 2]
    for left, right in pairs:
        product = _product(_exact(factors[left]), factors[right].T, unit)
        value = logits.value + product.value
        logits = Expected(value, logits.limit + product.limit + (narrow + unit) * value.abs())

    rows = _Rows(logits, labels, dloss, unit, LossOptions(**options))
    dlogits = rows.dlogits if narrow == 0 else rows.rounded(_stored(product_dtype, truncating))
    found = rows.outcome()
    for left, right in pairs:
        found[f"d{left}"] = _product(dlogits, factors[right], unit)
        found[f"d{right}"] = _product(_transposed(dlogits), factors[left], unit)
    if bias is not None:
        ones = torch.ones(len(logits.value), 1, dtype=WIDE)
        found["dbias"] = _product(_transposed(dlogits), ones, unit)
        named["bias"] = bias
    for name, tensor in named.items():
        found[f"d{name}"] = _gradient(found[f"d{name}"], tensor)
    return found


class _Rows:
    """Exact values of rows of logits (N, V), and the error of each, when computed with `unit`."""

    def __init__(
        self,
        logits: Expected,
        labels: Tensor,
        dloss: Tensor | float,
        unit: float,
        options: LossOptions,
    ) -> None:
        self.options, self.unit, self.shape = options, unit, labels.shape
        labels = labels.detach().cpu().long().reshape(-1)
        self.counts = labels != options.ignore_index
        classes = logits.value.shape[1]
        assert ((labels >= 0) & (labels < classes) | ~self.counts).all()
        self.label = torch.where(self.counts, labels, 0)[:, None]
        self._weigh(dloss)
        self._logits(logits)
        self._probabilities(2 + classes**0.5)
        self._losses(2 + classes**0.5)
        self.dlogits = self._gradient()

    def _weigh(self, dloss: Tensor | float) -> None:
        """What each loss is multiplied by, and its gradient."""
        options, count = self.options, self.counts.numel()
        weights = torch.ones(count, dtype=WIDE)
        if options.token_weights is not None:
            weights = options.token_weights.detach().cpu().to(WIDE).reshape(-1)
        weights = torch.where(self.counts, weights, 0.0)
        if options.reduction == "mean":
            counted = self.counts.sum() if options.num_items is None else options.num_items
            divisor = float(counted)
            weights = weights / (divisor if divisor != 0 else 1.0)
        upstream = torch.as_tensor(dloss).detach().cpu().to(WIDE)
        self.weights = weights
        self.coefficients = weights * (upstream.reshape(-1) if upstream.dim() else upstream)

    def _logits(self, logits: Expected) -> None:
        """z, and dz/da."""
        scale, softcap = self.options.scale, self.options.softcap
        z = scale * logits.value
        self.ratio = torch.zeros_like(z)
        if softcap is not None:
            self.ratio = torch.tanh(z / softcap)
            z = softcap * self.ratio
        self.z = z
        self.size = torch.where(z.isinf(), 0.0, z.abs())
        roundings = CAPPED if softcap is not None else 0 if scale == 1 else SCALED
        self.z_error = abs(scale) * logits.limit + roundings * self.unit * self.size
        self.slope = scale * (1 - self.ratio.square())
        self.slope_error = 0 * self.slope
        if softcap is not None:
            in_ratio = 2 * self.ratio.abs() * (self.z_error / softcap + self.unit)
            self.slope_error = abs(scale) * (in_ratio + 3 * self.unit)

    def _probabilities(self, sum_of_classes: float) -> None:
        unit = self.unit
        self.maximum = self.z.amax(1, keepdim=True)
        below = self.z - self.maximum
        self.log_sum = below.exp().sum(1, keepdim=True).log()
        self.log_sum_exp = self.maximum + self.log_sum
        self.p = (self.z - self.log_sum_exp).exp()
        exponential = self.z_error + unit * (4 + 3 * torch.where(below.isinf(), 0.0, -below))
        self.exponential = exponential  # the relative error of each exp(z - maximum)
        self.sum_error = self._mean(exponential) + unit * (4 + sum_of_classes)  # relative
        relative = torch.expm1(exponential + self.sum_error + 4 * unit)
        self.p_error = torch.where(self.p == 0, 0.0, self.p * relative) + _flushed(unit)
        self.log_sum_error = self.sum_error + 4 * unit * self.log_sum
        self.log_sum_exp_error = self.log_sum_error + unit * self.log_sum_exp.abs()

    def _losses(self, sum_of_classes: float) -> None:
        unit, options = self.unit, self.options
        own = self.z.gather(1, self.label)
        log_probs = (own - self.maximum) - self.log_sum
        nll_error = self.z_error.gather(1, self.label) + self.log_sum_error
        nll_error = nll_error + 2 * unit * ((own - self.maximum).abs() + self.log_sum)
        mean = self.z.mean(1, keepdim=True)
        uniform_size = mean.abs() + self.maximum.abs() + self.log_sum
        uniform_error = self.z_error.mean(1, keepdim=True) + self.log_sum_error
        uniform_error += unit * (
            sum_of_classes * self.size.mean(1, keepdim=True) + 3 * uniform_size
        )
        smoothing, z_loss = options.label_smoothing, options.z_loss
        loss = (1 - smoothing) * -log_probs + z_loss * self.log_sum_exp.square()
        error = (1 - smoothing) * nll_error + z_loss * self.log_sum_exp.abs() * (
            2 * self.log_sum_exp_error + 3 * unit * self.log_sum_exp.abs()
        )
        if smoothing:
            loss = loss + smoothing * ((self.maximum - mean) + self.log_sum)
            error = error + smoothing * uniform_error
        weighted = torch.where(self.p == 0, 0.0, self.p * self.z).sum(1, keepdim=True)
        weighted_error = self._mean(self.size * self.exponential + self.z_error)
        size = self._mean(self.size)
        entropy_error = (
            weighted_error
            + size * (self.sum_error + unit * (4 + sum_of_classes))
            + self.log_sum_error
            + 2 * unit * (self.maximum.abs() + self.log_sum)
        )
        entropy = self.maximum - weighted + self.log_sum
        self.losses = Expected(loss, error + 4 * unit * loss.abs())
        self.log_probs = Expected(log_probs, nll_error)
        self.entropy = Expected(entropy, entropy_error)

    def _gradient(self) -> Expected:
        """dlogits (N, V), before it is rounded to be stored."""
        unit, options = self.unit, self.options
        uniform = options.label_smoothing / self.z.shape[1]
        weight = 1 + 2 * options.z_loss * self.log_sum_exp
        weight_error = 2 * options.z_loss * self.log_sum_exp_error + 3 * unit * weight.abs()
        hot = torch.zeros_like(self.z).scatter_(1, self.label, 1 - options.label_smoothing)
        inner = weight * self.p - hot - uniform
        inner_error = weight.abs() * self.p_error + weight_error * self.p
        inner_error = inner_error + 4 * unit * (weight.abs() * self.p + hot + uniform)
        factor = self.coefficients.reshape(-1, 1)
        value = factor * inner * self.slope
        error = inner_error * self.slope.abs() + inner.abs() * self.slope_error
        limit = factor.abs() * error + 8 * unit * value.abs()
        # An ignored row's is exactly 0, whatever the row holds.
        counts = self.counts[:, None]
        return Expected(torch.where(counts, value, 0.0), torch.where(counts, limit, 0.0))

    def _mean(self, values: Tensor) -> Tensor:
        """Over the row's distribution."""
        return torch.where(self.p == 0, 0.0, self.p * values).sum(1, keepdim=True)

    def rounded(self, stored: Callable[[Tensor], Tensor]) -> Expected:
        """dlogits after it is stored."""
        value = self.dlogits.value
        rounding = torch.where(self.counts[:, None], stored(value), 0.0)
        return Expected(value, self.dlogits.limit + rounding)

    def outcome(self) -> dict[str, Expected]:
        """loss, as the reduction has it, and log_probs and entropy of the labels' shape."""

        def of_rows(expected: Expected) -> Expected:
            value, limit = (
                torch.where(self.counts, t[:, 0], 0.0) for t in (expected.value, expected.limit)
            )
            return _shaped(Expected(value, limit), self.shape)

        losses = of_rows(self.losses)
        value = self.weights * losses.value.reshape(-1)
        limit = self.weights.abs() * losses.limit.reshape(-1) + 3 * self.unit * value.abs()
        if self.options.reduction == "none":
            loss = _shaped(Expected(value, limit), self.shape)
        else:  # divided, and stored
            loss = Expected(value.sum(), limit.sum() + 3 * self.unit * value.sum().abs())
        return {
            "loss": loss,
            "log_probs": of_rows(self.log_probs),
            "entropy": of_rows(self.entropy),
        }


def _compute(dtype: torch.dtype) -> torch.dtype:
    return WIDE if dtype == WIDE else torch.float32


def _flushed(unit: float) -> float:
    """What may become 0: exponentials below the smallest normal number."""
    return 2 * torch.finfo(torch.float32 if unit == ROUNDOFF[torch.float32] else WIDE).tiny


def _stored(dtype: torch.dtype, truncating: bool) -> Callable[[Tensor], Tensor]:
    """The error of storing a value: a rounding, or where it is too small for that, all of it."""
    relative = ROUNDOFF[dtype] * (2 if truncating else 1)
    absolute = max(torch.finfo(dtype).tiny * relative, torch.finfo(_compute(dtype)).tiny)
    return lambda value: relative * value.abs() + absolute


def _gradient(of: Expected, tensor: Tensor) -> Expected:
    """A factor's gradient, after it is stored in the factor's dtype; exactly 0 where nothing is."""
    stored = STORED * _stored(tensor.dtype, False)(of.value)
    limit = of.limit + torch.where((of.value == 0) & (of.limit == 0), 0.0, stored)
    return _shaped(Expected(of.value, limit), tensor.shape)


def _product(a: Expected, b: Tensor, unit: float) -> Expected:
    """a @ b, b exact."""
    size = a.value.abs() @ b.abs()
    terms = 2 + a.value.shape[1] ** 0.5
    return Expected(a.value @ b, a.limit @ b.abs() + terms * unit * size)


def _exact(tensor: Tensor) -> Expected:
    value = tensor.detach().cpu().to(WIDE)
    return Expected(value, torch.zeros_like(value))


def _transposed(expected: Expected) -> Expected:
    return Expected(expected.value.T, expected.limit.T)


def _shaped(expected: Expected, shape: torch.Size) -> Expected:
    return Expected(expected.value.reshape(shape), expected.limit.reshape(shape))
