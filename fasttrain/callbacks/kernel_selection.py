"""Decides which kernel serves each site of the model, and writes the decisions down."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
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
from fasttrain.model.transforms.sites.search import SEARCHES, Search
from fasttrain.model.transforms.sites.site import NotASite, Site
from fasttrain.runtime.files import write_atomically

if TYPE_CHECKING:
    from fasttrain.core.run import Run

AUTO, EAGER = "auto", "eager"


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
    plan = decided or KernelPlan()
    taken = {(site.op, site.path) for site in plan.sites}
    for search in SEARCHES:
        found = _select(search, model, profile, config, taken)
        plan = KernelPlan((*plan.sites, *found.sites), (*plan.rows, *found.rows))
    return plan


def _select(
    search: Search,
    model: nn.Module,
    profile: BatchProfile,
    config: KernelsConfig,
    taken: set[tuple[str, str]],
) -> KernelPlan:
    """Sites and rows of one op; sites that are `taken` are somebody else's."""
    every_site, others = search.find(model)
    sites = [site for site in every_site if (site.op, site.path) not in taken]
    requested = getattr(config, search.op)
    if not every_site and requested not in (AUTO, EAGER):
        raise _no_site(search, requested, others)
    groups: dict[Choice, list[Site]] = defaultdict(list)
    for site in sites:
        groups[_choose(site, requested, profile, config)].append(site)
    chosen = [
        KernelSite(site.path, search.op, choice.backend)
        for choice, group in groups.items()
        for site in group
    ]
    rows = [_row(choice, len(group), len(sites)) for choice, group in groups.items()]
    if not sites and not others:
        rows.append(KernelRow(search.op, 0, 0, EAGER, f"the model has no {search.what}"))
    return KernelPlan(tuple(chosen), (*rows, *_unmatched_rows(search.op, others)))


def _choose(site: Site, requested: str, profile: BatchProfile, config: KernelsConfig) -> Choice:
    try:
        return choose(
            site.op,
            requested=requested,
            mode=config.mode,
            source="the config",
            device=profile.device,
            dtype=profile.dtype,
            **site.facts(profile),
        )
    except ValueError as error:  # UnsupportedKernel, or settings that contradict each other
        raise UserError(Problem(key=f"kernels.{site.op}", what=f"{error}.")) from error


def _no_site(search: Search, backend: str, others: Sequence[NotASite]) -> UserError:
    looks = f" ({others[0].path} looks like one, but {others[0].reason})" if others else ""
    return UserError(
        Problem(
            key=f"kernels.{search.op}",
            what=f"'{backend}' was asked for, and the model has no {search.what}{looks}.",
            hint="Leave the key out.",
        )
    )


def _row(choice: Choice, matched: int, found: int) -> KernelRow:
    return KernelRow(
        op=choice.op,
        sites_matched=matched,
        sites_found=found,
        chosen=choice.backend,
        reason=choice.reason,
        rejected=tuple((rejected.backend, rejected.reason) for rejected in choice.rejected),
        parity=choice.parity,
        milliseconds=choice.milliseconds,
    )


def _unmatched_rows(op: str, others: Sequence[NotASite]) -> list[KernelRow]:
    """A row for each reason why a module that looks like a site is left alone."""
    paths: dict[str, list[str]] = defaultdict(list)
    for other in others:
        paths[other.reason].append(other.path)
    return [
        KernelRow(op, 0, len(names), EAGER, f"left alone, {reason} (such as {names[0]})")
        for reason, names in paths.items()
    ]
