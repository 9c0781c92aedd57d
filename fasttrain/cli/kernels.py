"""`fasttrain kernels list|explain|check|bench|reset`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fasttrain.cli.quiet import quiet_third_parties
from fasttrain.config.errors import Problem, UserError

if TYPE_CHECKING:
    import torch

    from fasttrain.config.schema.root import TrainConfig
    from fasttrain.core.batch import BatchProfile

HEADINGS = ("op", "backend", "usable", "why")
CHECK_HEADINGS = ("op", "backend", "self-test", "worst error / allowed")


def list_kernels() -> None:
    """Print every op and backend, and whether it can serve a typical call on this machine."""
    from fasttrain.callbacks.screen import table
    from fasttrain.runtime.device import choose_device, describe_device
    from fasttrain.runtime.log import output
    from fasttrain.runtime.precision import choose_precision

    device = choose_device("auto")
    dtype = choose_precision("auto", device).activations
    name = str(dtype).removeprefix("torch.")
    try:
        rows = kernel_rows(device, dtype)
    except ValueError as error:  # FASTTRAIN_KERNELS asks for what is not, or can't serve
        raise UserError(Problem(where="environment", what=str(error))) from error
    output().print(f"{describe_device(device)}, {name}, in order of preference:")
    output().print(*table(HEADINGS, rows))


def kernel_rows(device: torch.device, dtype: torch.dtype) -> list[tuple[str, str, str, str]]:
    """(op, backend, yes or no, why) for a typical call of each op on `device`."""
    from fasttrain_kernels.registry import OPS
    from fasttrain_kernels.selection import advice, why_not

    rows = []
    for name, op in sorted(OPS.items()):
        problem = op.describe(device=device, dtype=dtype, **op.example)
        chosen = op.choose(problem).backend
        for candidate in op.candidates:
            reason = None
            if not candidate.made_for(device.type):
                reason = f"made for {', '.join(candidate.devices)}"
            reason = reason or why_not(op, candidate, problem)
            why = reason or ("chosen by auto" if candidate.name == chosen else "")
            why = why or advice(candidate, problem) or ""
            rows.append((name, candidate.name, "no" if reason else "yes", why))
    return rows


def explain_kernels(file: str, overrides: Sequence[str], *, sites: bool) -> None:
    """Print the table that a run of FILE would print, without weights and without data; with
    `sites` every site by its name too."""
    from fasttrain.config.load import load

    config = load(file, overrides).config
    quiet_third_parties()
    from fasttrain.callbacks.kernel_selection import KernelSelection
    from fasttrain.callbacks.screen import LABEL_WIDTH, kernel_section, table
    from fasttrain.config.registry import MODELS
    from fasttrain.runtime.log import output

    factory = MODELS.component(config.model.type)(config.model)
    model = factory.skeleton()
    batches = profile(config, factory.max_length())
    plan = KernelSelection().plan(model, batches, config.kernels)
    output().print(*kernel_section(plan), indent=LABEL_WIDTH)
    if sites:
        rows = [(site.op, site.backend, site.path) for site in plan.sites]
        output().print(*table(("op", "backend", "site"), rows))


def profile(config: TrainConfig, model_max_length: int | None) -> BatchProfile:
    """The batches that a run of this config would see on this machine, as far as they are known."""
    from fasttrain.core.batch import BatchProfile
    from fasttrain.core.build import build_engine, optimizer_factory

    engine = build_engine(config)
    length = config.data.max_length or min(model_max_length or 8192, 8192)
    return BatchProfile(
        device=engine.device,
        dtype=engine.precision.activations,
        tokens=config.micro_batch_size * length,
        document_lengths=(),
        optimizer=optimizer_factory(config).kernel_facts(engine.precision),
    )


def bench_kernels(file: str, overrides: Sequence[str]) -> None:
    """Read FILE's data, make its model, time every kernel on its sizes; keep and print the times.

    What is on record is measured no second time: `reset` forgets it.
    """
    from fasttrain.config.load import load

    loaded = load(file, [*overrides, "kernels.autotune=full"])
    quiet_third_parties()
    from fasttrain.callbacks.kernel_selection import KernelSelection
    from fasttrain.callbacks.screen import LABEL_WIDTH, kernel_section
    from fasttrain.config.registry import TRAINERS
    from fasttrain.core.build import build_data, build_engine, build_model
    from fasttrain.core.events import Hooks
    from fasttrain.core.run import Run
    from fasttrain.runtime.log import output

    hooks = Hooks([KernelSelection()])
    engine = build_engine(loaded.config)
    run = Run(loaded.config, Path(), hooks, run_id="", dry_run=True, engine=engine)
    hooks.bind(run)
    build_data(run, TRAINERS.component(loaded.config.type))
    build_model(run)
    output().print(*kernel_section(run.kernels), indent=LABEL_WIDTH)


def check_kernels(only: str | None) -> int:
    """Run every self-test here, print what it finds, and put what fails in quarantine. 1 where one
    fails. `only`: an op, or op=backend."""
    from fasttrain_kernels import check, quarantine

    from fasttrain.callbacks.screen import table
    from fasttrain.runtime.device import choose_device, describe_device
    from fasttrain.runtime.log import output

    device = choose_device("auto")
    rows = []
    for row in check(*op_and_backend(only), device=device):
        failed = row.parity is not None and not row.passed
        state = "failed" if failed else "passed" if row.passed else "not run"
        shown = row.reason or f"{row.parity:.2f}"
        rows.append((row.op, row.backend, state, shown))
        if failed and row.backend != "eager":
            quarantine(row.op, row.backend, f"its self-test fails: {shown}", device=device)
    output().print(f"{describe_device(device)}:")
    output().print(*table(CHECK_HEADINGS, rows))
    return int(any(state == "failed" for *_, state, _ in rows))


def reset_kernels(only: str | None) -> None:
    """Forget proofs, times and quarantines: all of them, or those of an op, or of op=backend."""
    from fasttrain_kernels import reset, store

    from fasttrain.runtime.log import output

    try:
        reset(*op_and_backend(only))
    except OSError as error:
        raise UserError(Problem(where=str(error.filename), what=f"{error.strerror}.")) from error
    output().print(f"{only or 'everything'} is forgotten ({store.directory()})")


def op_and_backend(only: str | None) -> tuple[str | None, str | None]:
    """Of "op" or "op=backend"; UserError where there is no such thing."""
    from fasttrain_kernels.registry import find

    if only is None:
        return None, None
    op, _, backend = only.partition("=")
    try:
        names = [candidate.name for candidate in find(op).candidates]
    except ValueError as error:
        raise UserError(Problem(what=f"{error}.")) from error
    if backend and backend not in names:
        what = f"{op} has no backend '{backend}'; it has {', '.join(names)}."
        raise UserError(Problem(what=what))
    return op, backend or None
