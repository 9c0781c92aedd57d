"""Builds a run from its config, block by block, and trains it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from fasttrain.components import ALWAYS_CALLBACKS, INNERMOST_CALLBACKS, TRANSFORM_ORDER
from fasttrain.config.errors import Problem, UserError
from fasttrain.config.load import LoadedConfig
from fasttrain.config.registry import (
    CALLBACKS,
    CHECKPOINTS,
    DATA,
    ENGINES,
    MODELS,
    OPTIMIZERS,
    SCHEDULERS,
    TOKENIZERS,
    TRAINERS,
    TRANSFORMS,
)
from fasttrain.config.schema.model import KernelsTransformConfig, TransformSection
from fasttrain.config.schema.root import TrainConfig
from fasttrain.core import metrics_file
from fasttrain.core.batch import BatchProfile
from fasttrain.core.checkpoint_interface import Checkpoint, ResumableCheckpoint
from fasttrain.core.engine_interface import Engine
from fasttrain.core.events import Callback, Hooks, Result, Resumed
from fasttrain.core.interfaces import (
    LanguageModel,
    LoadedData,
    ModelFactory,
    OptimizerFactory,
    PreparedData,
    SchedulerFactory,
)
from fasttrain.core.kernel_plan import KernelPlan
from fasttrain.core.metrics_file import cut_metrics
from fasttrain.core.parameter_groups import parameter_groups
from fasttrain.core.parameter_names import freeze
from fasttrain.core.plan import plan_batches, plan_horizon
from fasttrain.core.run import Run
from fasttrain.core.run_directory import RunDirectory, open_run_directory
from fasttrain.core.saving import Saver
from fasttrain.core.signals import stop_on_signals
from fasttrain.core.trainer import Trainer, kill_file
from fasttrain.runtime.device import choose_device, describe_device
from fasttrain.runtime.precision import choose_precision
from fasttrain.runtime.random_state import seed_everything


def run(
    loaded: LoadedConfig, *, dry_run: bool = False, callbacks: Sequence[Callback] = ()
) -> Result:
    """Train as `loaded` says; with `dry_run` build everything and stop before the first step.

    The user's mistakes are UserErrors, raised before the model is built; what only the model shows,
    before training.
    """
    config = loaded.config
    engine = build_engine(config)
    method = TRAINERS.component(config.type)
    hooks = Hooks(build_callbacks(config, method, callbacks))
    checkpoints = [CHECKPOINTS.component(section.type)(section) for section in config.checkpoint]
    with open_run_directory(loaded, checkpoints, dry_run=dry_run) as directory:
        state = Run(
            config=config,
            directory=directory.path,
            hooks=hooks,
            run_id=directory.run_id,
            resolved_config=directory.resolved_config,
            dry_run=dry_run,
            engine=engine,
            resume_from=directory.resume_from,
            notes=config_notes(loaded),
        )
        hooks.bind(state)
        try:
            return _train(state, method, checkpoints, directory)
        except BaseException as error:
            hooks.emit("error", error)
            raise


def _train(
    run: Run, method: type[Trainer], checkpoints: list[Checkpoint], directory: RunDirectory
) -> Result:
    run.hooks.emit("run_start")
    refuse_kill_file(run)
    build_data(run, method)
    build_model(run)
    build_optimizer(run)
    run.notes.append(("run", directory.message))
    # Dropout and the like begin from the seed, whatever building the model has drawn; a resumed
    # run takes up the saved states instead.
    seed_everything(run.config.seed)
    restore(run, checkpoints, directory)
    if run.dry_run:
        return end(run, "dry run: everything is built, nothing was trained")
    with stop_on_signals(run):
        method(run.config.trainer, run, Saver(run, checkpoints)).train()
    if run.finished and not run.failed_saves:
        directory.mark_finished()
    return end(run, run.stop_reason or f"all {run.total_steps} steps are done")


def end(run: Run, reason: str) -> Result:
    """Tell the callbacks how the run ended."""
    result = Result(
        directory=run.directory,
        step=run.step,
        loss=run.loss,
        eval_loss=run.eval_loss,
        reason=reason,
        finished=run.finished and not run.dry_run,
        exit_code=run.exit_code,
    )
    run.hooks.emit("run_end", result)
    return result


# --- before the blocks --------------------------------------------------------------------------


def build_engine(config: TrainConfig) -> Engine:
    """Device, precision and engine. One process uses one device; several are refused for now."""
    section = config.engine
    try:
        device = choose_device(section.device)
    except RuntimeError as error:
        problem = Problem(key="engine.device", what=f"{error}.", hint="Use engine.device=cpu.")
        raise UserError(problem) from error
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        raise UserError(
            Problem(
                key="engine",
                what=f"{torch.cuda.device_count()} GPUs are visible; the local engine uses one.",
                hint="Start with CUDA_VISIBLE_DEVICES=0, or with engine.device=cpu.",
            )
        )
    name = "local" if section.type == "auto" else section.type
    precision = choose_precision(
        config.precision, device, optimizer_keeps_masters=optimizer_factory(config).keeps_masters
    )
    engine: Engine = ENGINES.component(name)(section, precision=precision, device=device)
    return engine


def build_callbacks(
    config: TrainConfig, method: type[Trainer], extra: Iterable[Callback]
) -> list[Callback]:
    """The ones every run has, the method's, the config's, then those given in Python; innermost the
    choice of kernels."""
    sections = {section.type: section for section in config.callbacks}

    def built_in(names: tuple[str, ...]) -> list[Callback]:
        found = [sections.pop(name, None) or CALLBACKS.config(name)() for name in names]
        return [CALLBACKS.component(section.type)(section) for section in found]

    first, last = built_in(ALWAYS_CALLBACKS), built_in(INNERMOST_CALLBACKS)
    own = [callback() for callback in method.callbacks]
    for section in config.callbacks:
        if section.type in sections:
            own.append(CALLBACKS.component(section.type)(section))
    own += extra
    return [*_not_derived(first, own), *own, *_not_derived(last, own)]


def _not_derived(built_in: list[Callback], own: list[Callback]) -> list[Callback]:
    """Those of which `own` has no subclass, which would take its place."""
    return [each for each in built_in if not any(isinstance(one, type(each)) for one in own)]


def refuse_kill_file(run: Run) -> None:
    """A kill file left from before would stop the run at its first step."""
    path = Path(kill_file(run))
    if path.exists() and not run.dry_run:
        raise UserError(
            Problem(where=str(path), what="this kill file stops every run.", hint="Remove it.")
        )


# --- the blocks ---------------------------------------------------------------------------------


def build_data(run: Run, method: type[Trainer]) -> None:
    """Rows, tokenizer, packs, and the horizon that follows from them."""
    config, hooks = run.config, run.hooks
    batches = plan_batches(config, run.engine.topology.data_parallel_size)
    factory = DATA.component(config.data.type)(config.data)
    loaded: LoadedData = factory.load(examples=method.examples, seed=config.seed, hooks=hooks)
    tokenizers = TOKENIZERS.component(config.tokenizer.type)(config.tokenizer)
    run.tokenizer = hooks.call(
        "create_tokenizer", lambda: tokenizers.build(model_section=config.model, data=loaded)
    )
    hooks.emit("tokenizer_created", run.tokenizer)

    def tokenize(rows: LoadedData, tokenizer: object) -> PreparedData:
        prepared: PreparedData = factory.prepare(
            rows,
            tokenizer=tokenizer,
            model_max_length=_model_factory(config).max_length(),
            micro_batch_size=batches.micro_batch_size,
            accumulation=batches.accumulation,
            topology=run.engine.topology,
            seed=config.seed,
            hooks=hooks,
        )
        return prepared

    run.data = hooks.call("tokenize", tokenize, loaded, run.tokenizer)
    horizon = plan_horizon(config, run.data.train)
    run.total_steps = horizon.total_steps
    _scheduler_factory(config).check(run.total_steps)
    run.notes += [*engine_notes(run.engine), ("batch", str(batches)), ("horizon", horizon.reason)]
    hooks.emit("data_ready", run.data.report)


def build_model(run: Run) -> None:
    """The model with its transforms; the kernels are selected on the way."""
    seed_everything(run.config.seed)
    run.model = run.hooks.call("create_model", lambda: _create_model(run))
    limit, longest = run.model.longest_document, run.data.report.longest_document
    if limit is not None and longest > limit:
        raise UserError(
            Problem(
                key="data.max_length",
                what=f"the longest document has {longest} tokens, and the model has positions for "
                f"{limit}.",
                hint=f"Set data.max_length={limit}.",
            )
        )
    run.hooks.emit("model_created", run.model)


def _create_model(run: Run) -> LanguageModel:
    config, engine = run.config, run.engine
    with engine.model_init_context():
        model = _model_factory(config).build(
            tokenizer=run.tokenizer, precision=engine.precision, device=engine.device
        )
    for section in ordered_transforms(config.model.transforms):
        if section.type == "kernels":
            run.kernels = select_kernels(run, model)
        transform = TRANSFORMS.component(section.type)(section)
        model = transform.apply(model, plan=run.kernels or KernelPlan())
    freeze(model, config.model.freeze)
    return model


def ordered_transforms(listed: Sequence[TransformSection]) -> list[TransformSection]:
    """The listed ones with `kernels` in its place: after the built-ins that must come before it."""
    before = set(TRANSFORM_ORDER[: TRANSFORM_ORDER.index("kernels")])
    place = max((i + 1 for i, section in enumerate(listed) if section.type in before), default=0)
    return [*listed[:place], KernelsTransformConfig(), *listed[place:]]


def select_kernels(run: Run, model: LanguageModel) -> KernelPlan:
    """Ask the callbacks which kernel serves which site. Without an answer every site is eager."""
    report = run.data.report
    tokens = run.config.micro_batch_size * report.max_length
    profile = BatchProfile(
        device=run.engine.device,
        dtype=run.engine.precision.activations,
        tokens=tokens,
        document_lengths=run.data.profile_lengths,
        supervised_tokens=tokens * report.supervised_tokens // max(report.tokens, 1),
        optimizer=optimizer_factory(run.config).kernel_facts(run.engine.precision),
    )
    plan: KernelPlan = run.hooks.call(
        "select_kernels", lambda model, profile: KernelPlan(), model, profile
    )
    run.kernels = plan
    run.hooks.emit("kernels_selected", plan)
    return plan


def build_optimizer(run: Run) -> None:
    """Optimizer and schedule; the engine takes model and optimizer under control."""
    config = run.config
    groups = parameter_groups(run.model, config.optimizer, head=run.model.output_weight())
    factory = optimizer_factory(config)
    run.optimizer = run.hooks.call(
        "create_optimizer",
        lambda: factory.build(groups, plan=run.kernels, precision=run.engine.precision),
    )
    run.hooks.emit("optimizer_created", run.optimizer)
    schedules = _scheduler_factory(config)
    run.scheduler = run.hooks.call(
        "create_scheduler",
        lambda: schedules.build(run.optimizer, total_steps=run.total_steps),
    )
    run.engine.attach(run.model, run.optimizer, max_grad_norm=config.max_grad_norm, hooks=run.hooks)


def restore(run: Run, checkpoints: Iterable[Checkpoint], directory: RunDirectory) -> None:
    """Go on from the checkpoint that the run directory chose, if it chose one."""
    if directory.resume_from is None:
        return
    reader = next(c for c in checkpoints if isinstance(c, ResumableCheckpoint))
    reader.restore(run, directory.resume_from)
    if not run.dry_run:
        cut_metrics(run.directory / metrics_file.FILE_NAME, run.step)
    record = Resumed(run.step, directory.resume_from, directory.skipped)
    run.hooks.emit("resumed", record)


def config_notes(loaded: LoadedConfig) -> list[tuple[str, str]]:
    """What the reading of the config has to say: imports, aliases, and what is worth knowing."""
    return [
        *(("import", str(imported)) for imported in loaded.imports),
        *(("config", str(alias)) for alias in loaded.aliases_used),
        *(("config", note) for note in loaded.notes),
    ]


def engine_notes(engine: Engine) -> list[tuple[str, str]]:
    """Engine and precision as the first screen states them."""
    where = describe_device(engine.device)
    return [
        ("engine", f"{type(engine).Config.model_fields['type'].default} on {where}"),
        ("precision", f"{engine.precision.name} ({engine.precision.reason})"),
    ]


def optimizer_factory(config: TrainConfig) -> OptimizerFactory:
    """What makes the optimizer."""
    factory: OptimizerFactory = OPTIMIZERS.component(config.optimizer.type)(config.optimizer)
    return factory


def _model_factory(config: TrainConfig) -> ModelFactory:
    factory: ModelFactory = MODELS.component(config.model.type)(config.model)
    return factory


def _scheduler_factory(config: TrainConfig) -> SchedulerFactory:
    factory: SchedulerFactory = SCHEDULERS.component(config.scheduler.type)(config.scheduler)
    return factory
