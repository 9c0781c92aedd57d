"""`fasttrain validate`"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fasttrain.config.load import LoadedConfig
    from fasttrain.config.schema.data import SourceSection
    from fasttrain.config.schema.root import TrainConfig


def validate(file: str, overrides: Sequence[str] = ()) -> None:
    """Check a config without device, network, process group or weights, and say what it amounts to.

    UserError with every problem where there are any.
    """
    from fasttrain.config.load import load

    loaded = load(file, overrides)
    print(f"ok: {file}")
    for what, fact in derived_facts(loaded):
        print(f"  {what:<10} {fact}")


def derived_facts(loaded: LoadedConfig) -> list[tuple[str, str]]:
    """(what, choice and reason) of everything that follows from the config alone."""
    config = loaded.config
    facts = [("import", str(imported)) for imported in loaded.imports]
    facts += [("config", f"{use} ({use.where})") for use in loaded.aliases_used]
    facts += [("config", note) for note in loaded.notes]
    facts.append(("method", config.type))
    facts.append(("model", _named(config.model.type, getattr(config.model, "name_or_path", None))))
    facts += [("data", _source(source)) for source in config.data.sources]
    facts += [("held out", _source(source)) for source in config.data.eval_sources]
    if config.data.eval_split:
        share = f"{100 * config.data.eval_split:g}%"
        facts.append(("held out", f"{share} of the rows, by the run's seed"))
    facts.append(("batch", _batch(config)))
    facts.append(("horizon", _horizon(config)))
    facts.append(("output", config.output_dir or f"runs/{loaded.name} (name of the config)"))
    return facts


def _named(kind: str, name: str | None) -> str:
    return f"{kind}: {name}" if name else kind


def _source(source: SourceSection) -> str:
    return _named(source.type, getattr(source, "path", getattr(source, "name_or_path", None)))


def _batch(config: TrainConfig) -> str:
    unit = "packs" if config.data.packing else "rows"
    micro, whole = config.micro_batch_size, config.global_batch_size
    if whole is not None:
        return f"{whole} {unit} per step, {micro} at a time on each device"
    accumulation = config.gradient_accumulation_steps or 1
    return (
        f"{micro * accumulation} {unit} per step and device = {micro} micro_batch_size × "
        f"{accumulation} gradient_accumulation_steps"
    )


def _horizon(config: TrainConfig) -> str:
    epochs = None if config.epochs is None else f"{config.epochs:g} epochs"
    steps = None if config.max_steps is None else f"{config.max_steps} steps"
    if epochs and steps:
        return f"{epochs} or {steps}, whichever ends first"
    return steps or epochs or "1 epoch (neither epochs nor max_steps is given)"
