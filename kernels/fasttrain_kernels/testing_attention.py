"""Exact values of packed attention in float64, and how far from them a backend may be.

Written out per document and head, once more, so that no code is compared with itself. Errors are
followed through the formulas to first order. `unit` is the roundoff of the dtype computed in; a sum
of n terms is off by 4 + sqrt(n) units of the sum of their sizes. `narrow` is that of the inputs'
dtype where it has 16 bits: a GPU's matrix units take p and ds rounded to it, and what is smaller
than `floor`, its smallest number, may be lost.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fasttrain_kernels.testing import ROUNDOFF, Expected

WIDE = torch.float64


class _Units(NamedTuple):
    unit: float
    narrow: float
    floor: float

    def of_sum(self, terms: int) -> float:
        return self.unit * (4 + math.sqrt(terms))


class Attention(NamedTuple):
    """A call's tensors beside q, k and v, and its options."""

    lengths: tuple[int, ...]
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    scale: float | None = None


def packed_attention_expected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Attention,
    *,
    do: Tensor,
    o: Tensor | None = None,
    truncating: bool = False,
) -> dict[str, Expected]:
    """o, lse, dq, dk, dv and dsinks. `o`: as the forward pass stored it, of which the backward pass
    makes its delta; by default within its limit. `truncating`: as for rms_norm_expected."""
    exact = torch.float64 if q.dtype == WIDE else torch.float32
    stored = ROUNDOFF[q.dtype] * (2 if truncating else 1)
    floor = torch.finfo(q.dtype).smallest_normal * torch.finfo(q.dtype).eps
    units = _Units(ROUNDOFF[exact], 0.0 if q.dtype == exact else stored, floor)
    inputs = [t.detach().cpu().to(WIDE) for t in (q, k, v, do)]
    kept = None if o is None else o.detach().cpu().to(WIDE)
    out = {
        name: Expected(torch.zeros(shape, dtype=WIDE), torch.zeros(shape, dtype=WIDE))
        for name, shape in (
            ("o", (*q.shape[:2], v.shape[2])),
            ("lse", (q.shape[1], q.shape[0])),
            ("dq", q.shape),
            ("dk", k.shape),
            ("dv", v.shape),
            ("dsinks", (q.shape[1] if call.sinks is not None else 0,)),
        )
    }
    begin, groups = 0, q.shape[1] // k.shape[1]
    for length in call.lengths:
        span = slice(begin, begin + length)
        begin += length
        for head in range(q.shape[1] if length else 0):
            heads = (head, head // groups, head // groups, head)
            query, key, value, grad = (t[span, n] for t, n in zip(inputs, heads, strict=True))
            before = None if kept is None else kept[span, head]
            sink = None if call.sinks is None else float(call.sinks[head])
            sink = None if sink == -math.inf else sink
            found = _one(query, key, value, grad, before, sink, call, units)
            for name, parts in found.items():
                for total, part in zip((out[name].value, out[name].limit), parts, strict=True):
                    _place(total, name, span, head, head // groups).add_(part)
    for name, expected in out.items():
        if name == "dsinks" and call.sinks is not None:
            expected.limit.add_(ROUNDOFF[call.sinks.dtype] * expected.value.abs())
        elif name != "lse":
            expected.limit.add_(stored * expected.value.abs() + floor)
    return out


def _place(total: Tensor, name: str, span: slice, head: int, shared: int) -> Tensor:
    """Where a document and a query head contribute to a result: dk and dv by the key head."""
    if name == "lse":
        return total[head, span]
    if name == "dsinks":
        return total[head]
    return total[span, head if name in ("o", "dq") else shared]


def _one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    stored_o: Tensor | None,
    sink: float | None,
    call: Attention,
    units: _Units,
) -> dict[str, tuple[Tensor, Tensor]]:
    """name -> (value, limit) of one document and one query head, before results are stored."""
    length, width = q.shape
    scale = width**-0.5 if call.scale is None else call.scale
    raw, raw_size = q @ k.T * scale, q.abs() @ k.abs().T * abs(scale)
    s, raw_error = raw, raw_size * units.of_sum(width)
    slope = torch.ones_like(raw)
    s_error = raw_error
    if call.softcap is not None:
        tanh = torch.tanh(raw / call.softcap)
        s, slope = call.softcap * tanh, 1 - tanh.square()
        s_error = raw_error * slope + 8 * units.unit * s.abs()
    seen = _seen(length, call)
    s = s.masked_fill(~seen, -math.inf)
    top = s if sink is None else torch.cat([s, s.new_full((length, 1), sink)], 1)
    lse = top.logsumexp(1)
    p = (s - lse[:, None]).exp()
    # exp(x - y) is off by 4 units of its value and 3 more for each unit of |x - y|, or of the sizes
    # that x and y are rounded at.
    sizes = torch.where(seen, s.abs() + lse.abs()[:, None], 0.0)
    mean_error = (p * s_error).sum(1)
    lse_error = mean_error + units.of_sum(length) + 3 * units.unit * lse.abs()
    p_relative = s_error + lse_error[:, None] + units.unit * (4 + 3 * sizes) + units.narrow
    o = p @ v
    p_error = p * p_relative + units.floor
    o_error = p_error @ v.abs() + units.of_sum(length) * (p @ v.abs())

    kept, kept_error = (o, o_error) if stored_o is None else (stored_o, torch.zeros_like(o))
    delta = (do * kept).sum(1)
    delta_error = (do.abs() * (kept_error + units.of_sum(width) * kept.abs())).sum(1)
    if stored_o is None:
        delta_error = delta_error + units.narrow * (do.abs() * o.abs()).sum(1)
    dp, dp_error = do @ v.T, do.abs() @ v.abs().T * units.of_sum(width)
    ds = p * (dp - delta[:, None]) * slope * scale
    slope_error = 0.0
    if call.softcap is not None:
        slope_error = 2 * (raw_error / call.softcap + 8 * units.unit)
    ds_error = abs(scale) * p * slope * (
        dp_error + delta_error[:, None] + (dp.abs() + delta.abs()[:, None]) * 4 * units.unit
    ) + (ds.abs() * p_relative + abs(scale) * p * (dp - delta[:, None]).abs() * slope_error)
    ds_error = ds_error + units.narrow * ds.abs() + units.floor
    tail = units.of_sum(length)
    outcome = {
        "o": (o, o_error),
        "lse": (lse, lse_error),
        "dq": (ds @ k, ds_error @ k.abs() + tail * (ds.abs() @ k.abs())),
        "dk": (ds.T @ q, ds_error.T @ q.abs() + 2 * tail * (ds.abs().T @ q.abs())),
        "dv": (p.T @ do, p_error.T @ do.abs() + 2 * tail * (p.T @ do.abs())),
    }
    if sink is not None:
        share = (sink - lse).exp()
        off = lse_error + units.unit * (4 + 3 * (abs(sink) + lse.abs()))
        error = share * (delta_error + delta.abs() * (off + tail))
        outcome["dsinks"] = (-(share * delta).sum(), error.sum())
    return outcome


def _seen(length: int, call: Attention) -> Tensor:
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    seen = distance >= 0 if call.causal else torch.ones(length, length, dtype=torch.bool)
    return seen if call.window is None else seen & (distance.abs() < call.window)
