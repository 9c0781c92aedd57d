"""Muon: momentum, made orthogonal, for hidden matrices; AdamW for everything else.

Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024); Liu et al., "Muon
is Scalable for LLM Training" (arXiv 2502.16982).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttrain_kernels.ops.newton_schulz.op import newton_schulz
from fasttrain_kernels.ops.newton_schulz.reference import QUINTIC, Coefficients
from fasttrain_kernels.ops.optimizer_step.op import optimizer_step
from fasttrain_kernels.ops.optimizer_step.step import Numbers, Step
from fasttrain_kernels.ops.optimizer_step.table import Table
from fasttrain_kernels.optim.adamw import AdamW
from fasttrain_kernels.optim.group_numbers import GroupNumbers
from fasttrain_kernels.optim.one_pass import OnePassOptimizer, check_share, scalar_on, sign_of
from fasttrain_kernels.optim.slots import (
    Batch,
    Kind,
    Names,
    add_slot,
    gradient_of,
    kind_of,
    make_state,
)
from fasttrain_kernels.settings import AUTO

ADJUSTMENTS = ("match_rms_adamw", "original")
MOMENTS = ("float32", "bfloat16")
MOMENTUM, NO_MOMENTS = Names("momentum_buffer"), Names("")
# Elements that are made orthogonal at once: 256 MB in float32, three times that on the way.
BATCH = 1 << 26


class _Matrix(NamedTuple):
    """A parameter of a Muon group that has a gradient."""

    parameter: Tensor
    gradient: Tensor
    group: dict[str, Any]
    stream: int  # its number among the optimizer's parameters

    @property
    def alike(self) -> tuple[Any, ...]:
        """What matrices have in common that go together."""
        group = self.group
        options = (group["momentum"], group["nesterov"], group["ns_steps"])
        shape = tuple(self.parameter.shape[-2:])
        coefficients = tuple(group["ns_coefficients"])
        return (shape, self.parameter.device, self.wide, *options, coefficients)

    @property
    def wide(self) -> torch.dtype:
        """The dtype of momentum on its way to an update."""
        return torch.float64 if self.parameter.dtype == torch.float64 else torch.float32


class Muon(AdamW):
    """Muon for parameter groups with `muon=True`, the default, and AdamW for those with False.

    Hidden matrices are Muon's, (m, n), or several in one parameter (E, m, n); embeddings, the
    output layer, norms and biases are not: muon_groups() makes groups of both kinds. ValueError
    where nothing is Muon's, or what is has other dimensions. `describe()` says what is whose.

    lr: of both kinds, where groups say nothing else. adjust_lr: "match_rms_adamw", so that steps
    are as large as AdamW's and its learning rates serve, times 0.2 sqrt(max(m, n)); or "original",
    times sqrt(max(1, m / n)). momentum, nesterov: of the gradients, as torch.optim.Muon has them.
    weight_decay: decoupled, times lr as given. ns_steps, ns_coefficients: of ops/newton_schulz.
    betas, eps: AdamW's. moments: "float32" or "bfloat16" for matrices, which is rounded to nearest,
    for momentum changes by twentieths; AdamW's groups may have "8bit". newton_schulz_backend: of
    that op.

    Other options, clipping and roundings: OnePassOptimizer. The step isn't one launch: matrices of
    one shape go together, BATCH elements at a time, and it is not for CUDA graphs. Whole matrices
    are needed: declare_slice() refuses them. State of a matrix: `step`, `momentum_buffer`, `master`
    or `compensation`.
    """

    options = (*AdamW.options, "newton_schulz_backend")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        *,
        nesterov: bool = True,
        adjust_lr: str = "match_rms_adamw",
        ns_steps: int = 5,
        ns_coefficients: Coefficients = QUINTIC,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        rounding: str = "master",
        moments: str = "float32",
        maximize: bool = False,
        newton_schulz_backend: str = AUTO,
        **options: Any,
    ) -> None:
        defaults = {
            "muon": True,
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "adjust_lr": adjust_lr,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "betas": betas,
            "eps": eps,
            "rounding": rounding,
            "moments": moments,
            "maximize": maximize,
        }
        self.newton_schulz_backend = newton_schulz_backend
        OnePassOptimizer.__init__(self, params, defaults, **options)
        if not any(group["muon"] and group["params"] for group in self.param_groups):
            raise ValueError(
                "Muon on 0 parameters: no group has muon=True; muon_groups(model) makes one of the "
                "hidden matrices"
            )

    def _begin(self) -> None:
        super()._begin()
        self._matrix_numbers: dict[Any, GroupNumbers] = {}

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        if not group["muon"]:
            return
        check_share(group, "momentum", [group["momentum"]])
        for name, allowed in (("adjust_lr", ADJUSTMENTS), ("moments", MOMENTS)):
            if group[name] not in allowed:
                expected = ", ".join(allowed)
                raise ValueError(f"{name}={group[name]!r} of a Muon group; expected {expected}")
        if group["ns_steps"] < 1:
            raise ValueError(f"ns_steps={group['ns_steps']}; expected 1 or more")
        for parameter in group["params"]:
            if parameter.dim() not in (2, 3):
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} is no matrix; put it into a "
                    "group with muon=False, which AdamW steps, as muon_groups() does"
                )

    def declare_slice(self, parameter: Tensor, *, tensor: int, offset: int) -> None:
        """As OnePassOptimizer has it, for AdamW's parameters. ValueError for Muon's."""
        if any(parameter is p for g in self.param_groups if g["muon"] for p in g["params"]):
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} is Muon's, which makes whole "
                "matrices orthogonal: a slice of one has other singular vectors. Keep matrices "
                "whole, or put them into a group with muon=False"
            )
        super().declare_slice(parameter, tensor=tensor, offset=offset)

    def describe(self) -> str:
        """One line: how many parameters, and elements, are whose."""
        counts = []
        for whose, muon in (("Muon", True), ("AdamW", False)):
            group = [p for g in self.param_groups if g["muon"] == muon for p in g["params"]]
            elements = sum(p.numel() for p in group)
            counts.append(f"{whose} on {len(group)} parameters of {elements:,} elements")
        return ", ".join(counts)

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n{self.describe()}"

    # --- the step --------------------------------------------------------------------------------

    @torch.no_grad()
    def _step(self, parameters: Sequence[Tensor], norm: Tensor | None) -> None:
        wanted = set(parameters)
        matrices = [matrix for matrix in self._matrices() if matrix.parameter in wanted]
        super()._step([*wanted - {matrix.parameter for matrix in matrices}], norm)
        for batch in _batches(matrices):
            self._step_together(batch, norm)

    def _matrices(self) -> Iterator[_Matrix]:
        stream = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = gradient_of(parameter) if group["muon"] else None
                if gradient is not None and parameter.numel() > 0:
                    yield _Matrix(parameter, gradient, group, stream)
                stream += 1

    def _step_together(self, matrices: Sequence[_Matrix], norm: Tensor | None) -> None:
        """Of matrices that are alike."""
        first = matrices[0]
        skipped = self._skipped(norm, first.parameter.device)
        updates = self._momenta(matrices, norm, skipped)
        updates = newton_schulz(
            updates,
            steps=first.group["ns_steps"],
            coefficients=tuple(first.group["ns_coefficients"]),
            backend=self.newton_schulz_backend,
        )
        counts = [_count(matrix.parameter) for matrix in matrices]
        self._apply(matrices, updates.split(counts), norm)
        if self.zero_grad_in_step:
            for matrix in matrices:
                zeros = torch.zeros_like(matrix.gradient)
                left = zeros if skipped is None else torch.where(skipped, matrix.gradient, zeros)
                matrix.gradient.copy_(left)

    def _momenta(
        self, matrices: Sequence[_Matrix], norm: Tensor | None, skipped: Tensor | None
    ) -> Tensor:
        """(B, m, n): momentum after this gradient, of all matrices; their state is stepped."""
        first = matrices[0]
        share, nesterov = first.group["momentum"], first.group["nesterov"]
        shape = (sum(_count(m.parameter) for m in matrices), *first.parameter.shape[-2:])
        together = torch.empty(shape, dtype=first.wide, device=first.parameter.device)
        parts = together.split([_count(m.parameter) for m in matrices])
        for (parameter, gradient, group, _), part in zip(matrices, parts, strict=True):
            state = self.state[parameter]
            make_state(state, MOMENTUM, parameter, _kind(parameter, group), offset=0)
            kept = state[MOMENTUM.first]
            part = part.view(parameter.shape)
            factor = self._factor(norm, parameter.device) * sign_of(group)
            torch.mul(gradient, factor, out=part)
            if skipped is not None:
                # A mean of equals is what it was, and nothing that isn't finite goes into it.
                torch.where(skipped, kept.to(part.dtype), part, out=part)
            mean = kept.to(part.dtype)
            mean.lerp_(part, 1 - share)
            if mean is not kept:
                kept.copy_(mean)
            part.lerp_(mean, share) if nesterov else part.copy_(mean)
        return together

    def _apply(
        self, matrices: Sequence[_Matrix], updates: Sequence[Tensor], norm: Tensor | None
    ) -> None:
        """Move parameters by their updates: without moments, SGD decays as AdamW does."""
        batch, numbers = Batch(), []
        for (parameter, _, group, stream), update in zip(matrices, updates, strict=True):
            ratio = _ratio(group["adjust_lr"], *parameter.shape[-2:])
            decay = group["weight_decay"] / ratio
            numbers.append(Numbers(group["lr"] * ratio, 0.0, 0.0, 0.0, decay))
            update = update.view(parameter.shape)
            place = (len(numbers) - 1, (stream, 0))
            add_slot(batch, self, NO_MOMENTS, parameter, update, group, *place, has_moments=False)
        for kind, slots in batch.by_kind.items():
            key = (kind, slots[0].stream, len(slots))
            sent = self._matrix_numbers.setdefault(key, GroupNumbers())
            work = Step(
                "sgd",
                kind.rounding,
                "none",
                slots,
                sent.on(kind.device, numbers),
                self._tables.setdefault(key, Table()),
                norm=scalar_on(norm, kind.device),
                skip=scalar_on(self.found_inf, kind.device),
                seed=self.seed,
            )
            optimizer_step(work, backend=self.backend)
        batch.write_back()
        torch.autograd.graph.increment_version(batch.parameters)

    def _skipped(self, norm: Tensor | None, device: torch.device) -> Tensor | None:
        """() whether this step changes nothing; None where nobody has looked."""
        flags = [] if norm is None else [~norm.to(device).isfinite()]
        if self.found_inf is not None:
            flags.append(self.found_inf.to(device).reshape(()) != 0)
        return torch.stack(flags).any() if flags else None

    def _factor(self, norm: Tensor | None, device: torch.device) -> Tensor:
        """() what gradients are multiplied by, as optimizer_step's: scale, and clipping."""
        scale = getattr(self, "grad_scale", None)
        scale = torch.ones((), device=device) if scale is None else scale.to(device).reshape(())
        factor = scale.double().reciprocal()
        if norm is not None and self.max_grad_norm is not None:
            size = norm.to(device).double() * factor + 1e-6
            factor = factor * (self.max_grad_norm / size).clamp(max=1.0)
        return factor.float()


def _batches(matrices: Sequence[_Matrix]) -> Iterator[list[_Matrix]]:
    """Those that are alike together, of at most BATCH elements, or one."""
    by_kind: dict[tuple[Any, ...], list[_Matrix]] = {}
    for matrix in matrices:
        by_kind.setdefault(matrix.alike, []).append(matrix)
    for alike in by_kind.values():
        batch: list[_Matrix] = []
        elements = 0
        for matrix in alike:
            elements += matrix.parameter.numel()
            if batch and elements > BATCH:
                yield batch
                batch, elements = [], matrix.parameter.numel()
            batch.append(matrix)
        yield batch


def _count(parameter: Tensor) -> int:
    """How many matrices a parameter holds."""
    return parameter.shape[0] if parameter.dim() == 3 else 1


def _kind(parameter: Tensor, group: dict[str, Any]) -> Kind:
    return kind_of(parameter, parameter, group, has_moments=True)


def _ratio(adjust_lr: str, rows: int, columns: int) -> float:
    """Of the step to the learning rate."""
    if adjust_lr == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))
