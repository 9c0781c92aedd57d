"""`fasttrain kernels list` and `fasttrain kernels explain FILE`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fasttrain.cli.quiet import quiet_third_parties
from fasttrain.config.errors import Problem, UserError

if TYPE_CHECKING:
    import torch

    from fasttrain.config.schema.root import TrainConfig
    from fasttrain.core.batch import BatchProfile

HEADINGS = ("op", "backend", "usable", "why")


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


def explain_kernels(file: str, overrides: Sequence[str]) -> None:
    """Print the table that a run of FILE would print, without weights and without data."""
    from fasttrain.config.load import load

    config = load(file, overrides).config
    quiet_third_parties()
    from fasttrain.callbacks.kernel_selection import select_kernels
    from fasttrain.callbacks.screen import LABEL_WIDTH, kernel_section
    from fasttrain.config.registry import MODELS
    from fasttrain.runtime.log import output

    factory = MODELS.component(config.model.type)(config.model)
    model = factory.skeleton()
    plan = select_kernels(model, profile(config, factory.max_length()), config.kernels)
    output().print(*kernel_section(plan), indent=LABEL_WIDTH)


def profile(config: TrainConfig, model_max_length: int | None) -> BatchProfile:
    """The batches that a run of this config would see on this machine, as far as they are known."""
    from fasttrain.core.batch import BatchProfile
    from fasttrain.core.build import build_engine

    engine = build_engine(config)
    length = config.data.max_length or min(model_max_length or 8192, 8192)
    return BatchProfile(
        device=engine.device,
        dtype=engine.precision.activations,
        tokens=config.micro_batch_size * length,
        document_lengths=(),
    )
