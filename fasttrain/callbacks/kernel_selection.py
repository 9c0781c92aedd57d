"""Decides which kernel serves each site of the model, and writes the decisions down."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttrain_kernels.dispatch import choose
from fasttrain_kernels.selection import Choice
from torch import nn

from fasttrain.callbacks.optimizer_sites import optimizer_searches
from fasttrain.callbacks.site_rules import AUTO, SiteRules
from fasttrain.config.errors import Problem, UserError
from fasttrain.config.kernel_rules import backends_of
from fasttrain.config.schema.callback import KernelSelectionConfig
from fasttrain.config.schema.kernels import OPTIMIZER_OPS, KernelsConfig
from fasttrain.core.batch import BatchProfile
from fasttrain.core.events import Callback
from fasttrain.core.interfaces import LanguageModel
from fasttrain.core.kernel_plan import EAGER, PREFER, KernelPlan, KernelRow, KernelSite
from fasttrain.model.transforms.sites.search import SEARCHES, Search
from fasttrain.model.transforms.sites.site import NotASite, Site
from fasttrain.runtime.files import write_atomically

if TYPE_CHECKING:
    from fasttrain.core.run import Run

FILE = "kernels.json"
OPS = (*(search.op for search in SEARCHES), *OPTIMIZER_OPS)

Before = Mapping[tuple[str, str], str]  # (op, path) -> backend


class KernelSelection(Callback):
    """Sites that a wrapper further in has decided on stay as it decided.

    Subclass it and override `choose` to decide otherwise about a site; or wrap `select_kernels` and
    change the plan that it returns (`KernelPlan.leaving`).
    """

    Config = KernelSelectionConfig

    def wrap_select_kernels(
        self,
        run: Run,
        call: Callable[[LanguageModel, BatchProfile], KernelPlan],
        model: LanguageModel,
        profile: BatchProfile,
    ) -> KernelPlan:
        """Rank 0 decides, and measures where that is asked for, so that all ranks agree."""
        decided = call(model, profile)
        before = backends_before(run.resume_from)
        return run.engine.from_rank_zero(
            lambda: self.plan(model, profile, run.config.kernels, decided=decided, before=before)
        )

    def on_kernels_selected(self, run: Run, record: KernelPlan) -> None:
        """Write kernels.json into the run directory; a dry run has none."""
        if run.dry_run or run.engine.topology.rank != 0:
            return
        sites = [
            {"path": site.path, "op": site.op, "backend": site.backend} for site in record.sites
        ]
        table = {"rows": [asdict(row) for row in record.rows], "sites": sites}
        text = json.dumps(table, indent=1, ensure_ascii=False)
        write_atomically(run.directory / FILE, text.encode())

    def plan(
        self,
        model: nn.Module,
        profile: BatchProfile,
        config: KernelsConfig,
        *,
        decided: KernelPlan | None = None,
        before: Before | None = None,
    ) -> KernelPlan:
        """The plan for `model`, which may lie on the meta device, and batches like `profile`.

        before: what served a site until the run stopped; it goes on with that where it can.
        UserError where a backend that was asked for by name can't serve, or has no site to serve,
        where a glob of `kernels.sites` fits none, and where `mode: strict` meets a fallback.
        """
        plan, rules = decided or KernelPlan(), SiteRules(config)
        taken = {(site.op, site.path) for site in plan.sites}
        for search in (*SEARCHES, *optimizer_searches(profile)):
            sites, others = search.find(model)
            _refuse_absence(search, getattr(config, search.op), sites, others)
            chosen: dict[Any, Choice] = {}  # layers are alike
            found = []
            for site in sites:
                asked, source = rules.asked(site.op, site.path)
                if (site.op, site.path) in taken:
                    continue
                kept = (before or {}).get((site.op, site.path))
                if asked == AUTO and kept in backends_of(site.op):
                    asked = PREFER + kept
                facts = site.facts(profile)
                key = (asked, source, *facts.items())
                if key not in chosen:
                    chosen[key] = self.choose(site, asked, source, profile, config)
                found.append(_decided(site, chosen[key], asked, config))
            rows = _rows_without_site(search, sites, others)
            plan = KernelPlan((*plan.sites, *found), (*plan.others, *rows), OPS)
        rules.refuse_unfitted()
        return plan

    def choose(
        self, site: Site, asked: str, source: str, profile: BatchProfile, config: KernelsConfig
    ) -> Choice:
        """What serves one site. `asked`: "auto", or the backend that `source` names."""
        try:
            return choose(
                site.op,
                requested=asked,
                mode=config.mode,
                source=source,
                in_model=True,
                autotune=config.autotune,
                deterministic=config.deterministic,
                providers=_providers(config),
                lengths=_full_batch(profile),
                device=profile.device,
                **{"dtype": profile.dtype, **site.facts(profile)},
            )
        except ValueError as error:  # UnsupportedKernel, or settings that contradict each other
            raise UserError(Problem(key=f"kernels.{site.op}", what=f"{error}.")) from error


def backends_before(checkpoint: Path | None) -> Before:
    """What served each site of the run that `checkpoint` is of, as its kernels.json says.

    A file that isn't there, or says nothing of the kind, says nothing: then all is chosen anew.
    """
    if checkpoint is None:
        return {}
    try:
        sites = json.loads((checkpoint.parent.parent / FILE).read_text())["sites"]
        return {(str(site["op"]), str(site["path"])): str(site["backend"]) for site in sites}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _decided(site: Site, choice: Choice, asked: str, config: KernelsConfig) -> KernelSite:
    by_name = asked != AUTO and not asked.startswith(PREFER)
    is_kept = asked == PREFER + choice.backend
    return KernelSite(
        site.path,
        site.op,
        choice.backend,
        "as before the run was resumed" if is_kept else choice.reason,
        tuple((rejected.backend, rejected.reason) for rejected in choice.rejected),
        choice.parity,
        choice.milliseconds,
        choice.eager_milliseconds,
        fixed=by_name or config.mode == "strict",
    )


def _providers(config: KernelsConfig) -> tuple[str, ...]:
    named = config.providers
    return named if isinstance(named, tuple) else {"all": ("all",), "none": ()}[named]


def _full_batch(profile: BatchProfile) -> tuple[int, ...]:
    """Lengths of documents that fill a micro-batch, as they come in the data."""
    lengths: list[int] = []
    room = profile.tokens
    for length in profile.document_lengths:
        lengths.append(min(length, room))
        room -= lengths[-1]
        if room == 0:
            break
    return tuple(lengths)


def _refuse_absence(
    search: Search, asked: str, sites: Sequence[Site], others: Sequence[NotASite]
) -> None:
    """UserError where a backend was asked for by name, and there is nothing that it could serve."""
    if sites or asked in (AUTO, EAGER):
        return
    looks = f" ({others[0].path} looks like one, but {others[0].reason})" if others else ""
    raise UserError(
        Problem(
            key=f"kernels.{search.op}",
            what=f"'{asked}' was asked for, and the model has no {search.what}{looks}.",
            hint="Leave the key out.",
        )
    )


def _rows_without_site(
    search: Search, sites: Sequence[Site], others: Sequence[NotASite]
) -> list[KernelRow]:
    """A row for each reason why a module that looks like a site is left alone; one where the model
    has nothing of the kind."""
    if search.op in OPTIMIZER_OPS:  # the step is its library's own
        return []
    if not sites and not others:
        return [KernelRow(search.op, 0, 0, EAGER, f"the model has no {search.what}")]
    paths: dict[str, list[str]] = defaultdict(list)
    for other in others:
        paths[other.reason].append(other.path)
    return [
        KernelRow(search.op, 0, len(names), EAGER, f"left alone, {reason} (such as {names[0]})")
        for reason, names in paths.items()
    ]
