"""Decides which kernel serves each site of the model, and writes the decisions down."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from fasttrain_kernels.dispatch import Choice, choose
from torch import nn

from fasttrain.config.errors import Problem, UserError
from fasttrain.config.schema.callback import KernelSelectionConfig
from fasttrain.config.schema.kernels import KernelsConfig
from fasttrain.core.batch import BatchProfile
from fasttrain.core.events import Callback
from fasttrain.core.interfaces import LanguageModel
from fasttrain.core.kernel_plan import KernelPlan, KernelRow, KernelSite
from fasttrain.model.transforms.sites import NormSite, NotASite, find_rms_norms
from fasttrain.runtime.files import write_atomically

if TYPE_CHECKING:
    from fasttrain.core.run import Run

AUTO, EAGER, RMS_NORM = "auto", "eager", "rms_norm"


class KernelSelection(Callback):
    """Sites that a wrapper further in has decided on stay as it decided."""

    Config = KernelSelectionConfig

    def wrap_select_kernels(
        self,
        run: Run,
        call: Callable[[LanguageModel, BatchProfile], KernelPlan],
        model: LanguageModel,
        profile: BatchProfile,
    ) -> KernelPlan:
        decided = call(model, profile)
        return select_kernels(model, profile, run.config.kernels, decided=decided)

    def on_kernels_selected(self, run: Run, record: KernelPlan) -> None:
        """Write kernels.json into the run directory; a dry run has none."""
        if run.dry_run or run.engine.topology.rank != 0:
            return
        text = json.dumps(asdict(record), indent=1, ensure_ascii=False)
        write_atomically(run.directory / "kernels.json", text.encode())


def select_kernels(
    model: nn.Module,
    profile: BatchProfile,
    config: KernelsConfig,
    *,
    decided: KernelPlan | None = None,
) -> KernelPlan:
    """The plan for `model`, which may lie on the meta device, and batches like `profile`.

    UserError where a backend that was asked for by name can't serve, or has no site to serve, and
    where `kernels.mode: strict` meets anything but the first choice.
    """
    decided = decided or KernelPlan()
    taken = {site.path for site in decided.sites}
    sites, others = find_rms_norms(model)
    sites = [site for site in sites if site.path not in taken]
    if not sites and config.rms_norm not in (AUTO, EAGER) and not taken:
        raise _no_site(config.rms_norm, others)
    groups: dict[Choice, list[NormSite]] = defaultdict(list)
    for site in sites:
        groups[_choose(site, profile, config)].append(site)
    chosen = [
        KernelSite(site.path, RMS_NORM, choice.backend)
        for choice, group in groups.items()
        for site in group
    ]
    found = len(sites)
    rows = [_row(choice, len(group), found) for choice, group in groups.items()]
    if not sites:
        rows.append(KernelRow(RMS_NORM, 0, 0, EAGER, "the model has no RMS norm"))
    rows += _unmatched_rows(others)
    return KernelPlan((*decided.sites, *chosen), (*decided.rows, *rows))


def _choose(site: NormSite, profile: BatchProfile, config: KernelsConfig) -> Choice:
    try:
        return choose(
            RMS_NORM,
            requested=config.rms_norm,
            mode=config.mode,
            source="the config",
            device=profile.device,
            dtype=profile.dtype,
            width=site.width,
            weight_dtype=site.weight_dtype,
            style=site.style,
        )
    except ValueError as error:  # UnsupportedKernel, or settings that contradict each other
        raise UserError(Problem(key=f"kernels.{RMS_NORM}", what=f"{error}.")) from error


def _no_site(backend: str, others: list[NotASite]) -> UserError:
    looks = f" ({others[0].path} looks like one, but {others[0].reason})" if others else ""
    return UserError(
        Problem(
            key=f"kernels.{RMS_NORM}",
            what=f"'{backend}' was asked for, and the model has no RMS norm{looks}.",
            hint="Leave the key out.",
        )
    )


def _row(choice: Choice, matched: int, found: int) -> KernelRow:
    return KernelRow(
        op=RMS_NORM,
        sites_matched=matched,
        sites_found=found,
        chosen=choice.backend,
        reason=choice.reason,
        rejected=tuple((rejected.backend, rejected.reason) for rejected in choice.rejected),
        parity=choice.parity,
        milliseconds=choice.milliseconds,
    )


def _unmatched_rows(others: list[NotASite]) -> list[KernelRow]:
    """A row for each reason why a module that looks like an RMS norm is left alone."""
    paths: dict[str, list[str]] = defaultdict(list)
    for other in others:
        paths[other.reason].append(other.path)
    return [
        KernelRow(RMS_NORM, 0, len(names), EAGER, f"left alone, {reason} (such as {names[0]})")
        for reason, names in paths.items()
    ]
