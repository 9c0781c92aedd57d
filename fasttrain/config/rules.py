"""What no single key can know: values that exclude each other, and files that must be there.

A rule reads a checked config and yields problems by key; `load` adds the line. A rule is left out
where one of the keys it reads is wrong already. Rules read files, and change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from fasttrain.components import TRANSFORM_ORDER
from fasttrain.config.data_rules import check_held_out, check_sources
from fasttrain.config.errors import Problem
from fasttrain.config.kernel_rules import check_kernels
from fasttrain.config.optimizer_rules import (
    check_gradient_release,
    check_package,
    check_parameter_rules,
    check_resumable,
    schedule_notes,
)
from fasttrain.config.path_rules import (
    check_kill_file,
    check_model_directory,
    check_output_dir,
    check_referenced_paths,
    check_resume,
)
from fasttrain.config.schema.callback import SamplesConfig
from fasttrain.config.schema.model import HuggingFaceModelConfig, RandomModelConfig
from fasttrain.config.schema.root import TrainConfig
from fasttrain.config.schema.scheduler import WsdConfig
from fasttrain.config.schema.tokenizer import HuggingFaceTokenizerConfig

MIN_LENGTH = 8  # tokens; a chat template alone takes that many

Check = Callable[[TrainConfig], Iterable[Problem]]


@dataclass(frozen=True)
class Rule:
    """One check, and the keys it reads."""

    check: Check
    reads: tuple[str, ...]


def check(config: TrainConfig, *, name: str, problems: Iterable[Problem] = ()) -> list[Problem]:
    """Every problem of the rules. `name` is the run's, `problems` are those found before."""
    wrong = {problem.key for problem in problems if problem.key}
    output = Rule(lambda config: check_output_dir(config, name), ("output_dir", "data", "model"))
    return [
        problem
        for rule in (*RULES, output)
        if not any(_touches(key, read) for key in wrong for read in rule.reads)
        for problem in rule.check(config)
    ]


def _touches(wrong: str, read: str) -> bool:
    """Whether a wrong key lies in, above or beside (as its section's `type`) a key that is read."""
    section = wrong.removesuffix(".type")
    return any(
        one == other or one.startswith((f"{other}.", f"{other}["))
        for one, other in ((wrong, read), (read, wrong), (read, section))
    )


# --- batches and steps ---------------------------------------------------------------------------


def check_batch(config: TrainConfig) -> Iterator[Problem]:
    """The global batch is a multiple of what one process takes at a time."""
    whole, micro = config.global_batch_size, config.micro_batch_size
    given = config.gradient_accumulation_steps
    if whole is None:
        return
    factor = micro * (given or 1)
    if whole % factor:
        product = f"micro_batch_size {micro}"
        if given is not None:
            product += f" × gradient_accumulation_steps {given} = {factor}"
        yield Problem(
            f"no multiple of {product} (got {whole}, {whole} ÷ {factor} leaves {whole % factor}).",
            key="global_batch_size",
            hint=f"Use {max(factor, whole - whole % factor)} or {whole - whole % factor + factor}."
            if whole > factor
            else f"Use {factor}, or a smaller micro_batch_size.",
        )


def check_length(config: TrainConfig) -> Iterator[Problem]:
    """A document needs room for a template and something to learn."""
    length = config.data.max_length
    if length is not None and length < MIN_LENGTH:
        what = f"too small (got {length}, expected at least {MIN_LENGTH} tokens)."
        yield Problem(what, key="data.max_length")


def check_warmup(config: TrainConfig) -> Iterator[Problem]:
    """Warm-up is given once, and leaves room for the rest."""
    scheduler = config.scheduler
    steps, ratio = scheduler.warmup_steps, scheduler.warmup_ratio
    if steps is not None and ratio is not None:
        what = f"excludes scheduler.warmup_ratio (got {steps} and {ratio:g})."
        yield Problem(what, key="scheduler.warmup_steps", hint="Keep one.")
    if steps is not None and config.max_steps is not None and steps >= config.max_steps:
        what = f"warm-up would fill the run (got {steps}, expected less than max_steps"
        yield Problem(f"{what} = {config.max_steps}).", key="scheduler.warmup_steps")
    if isinstance(scheduler, WsdConfig) and (ratio or 0) + scheduler.decay_ratio > 1:
        what = f"warm-up and decay overlap (got {scheduler.decay_ratio:g} + {ratio:g} > 1)."
        yield Problem(what, key="scheduler.decay_ratio")


# --- evaluation ----------------------------------------------------------------------------------


def check_evaluation(config: TrainConfig) -> Iterator[Problem]:
    """What evaluates needs held-out data."""
    data = config.data
    if data.eval_sources or data.eval_split > 0:
        return
    hint = "Set data.eval_split=5%, or name data.eval_sources."
    for key, value in (
        ("eval.every_steps", config.eval.every_steps),
        ("eval.at_start", config.eval.at_start),
        ("eval.max_batches", config.eval.max_batches),
    ):
        if value:
            yield Problem("there are no held-out data to evaluate.", key=key, hint=hint)
    for index, callback in enumerate(config.callbacks):
        writes_held_out = isinstance(callback, SamplesConfig) and not callback.prompts
        if writes_held_out or callback.type in ("early_stopping", "unigram_baseline"):
            what = f"'{callback.type}' needs held-out data, and there are none."
            yield Problem(what, key=f"callbacks[{index}]", hint=hint)


# --- components that go together -----------------------------------------------------------------


def check_transforms(config: TrainConfig) -> Iterator[Problem]:
    """The built-in transforms work in one order only, and once each."""
    latest: str | None = None
    for index, section in enumerate(config.model.transforms):
        key = f"model.transforms[{index}]"
        if section.type == "kernels":
            hint = "Remove it; its options are the top-level `kernels`."
            yield Problem("'kernels' is always there and not listed.", key=key, hint=hint)
        elif section.type in TRANSFORM_ORDER:
            if latest is not None and _order(section.type) < _order(latest):
                what = f"'{section.type}' stands after '{latest}' (expected before it)."
                yield Problem(what, key=key, hint=_ORDER_REASON)
            latest = max(latest or section.type, section.type, key=_order)


_ORDER_REASON = (
    "Adapters change which modules there are, checkpointing wraps the layers, and what is compiled "
    "is the result."
)


def _order(transform: str) -> int:
    return TRANSFORM_ORDER.index(transform)


def check_given_once(config: TrainConfig) -> Iterator[Problem]:
    """Two entries of one type would write the same files."""
    lists = {
        "checkpoint": config.checkpoint,
        "callbacks": config.callbacks,
        "model.transforms": config.model.transforms,
    }
    for key, sections in lists.items():
        types = [section.type for section in sections]
        for index, name in enumerate(types):
            if types.index(name) < index:
                first = f"{key}[{types.index(name)}]"
                what = f"'{name}' is given twice (first as {first})."
                yield Problem(what, key=f"{key}[{index}]", hint="Keep one.")


def check_tokenizer(config: TrainConfig) -> Iterator[Problem]:
    """A model from scratch brings no tokenizer."""
    section = config.tokenizer
    if (
        isinstance(config.model, RandomModelConfig)
        and isinstance(section, HuggingFaceTokenizerConfig)
        and section.name_or_path is None
    ):
        yield Problem(
            "a model with random weights has no tokenizer of its own.",
            key="tokenizer",
            hint="Set tokenizer.name_or_path, or tokenizer.type=trained to train one on the data.",
        )


RULES: tuple[Rule, ...] = (
    Rule(check_batch, ("global_batch_size", "micro_batch_size", "gradient_accumulation_steps")),
    Rule(check_length, ("data.max_length",)),
    Rule(check_warmup, ("scheduler", "max_steps")),
    Rule(check_evaluation, ("data.eval_sources", "data.eval_split", "eval", "callbacks")),
    Rule(check_held_out, ("data.eval_sources", "data.eval_split")),
    Rule(check_transforms, ("model.transforms",)),
    Rule(check_given_once, ("checkpoint", "callbacks", "model.transforms")),
    Rule(check_tokenizer, ("model", "tokenizer")),
    Rule(check_sources, ("data.sources", "data.eval_sources", "data.invalid")),
    Rule(check_model_directory, ("model",)),
    Rule(check_referenced_paths, ("model", "tokenizer")),
    Rule(check_kernels, ("kernels",)),
    Rule(check_parameter_rules, ("optimizer.rules",)),
    Rule(
        check_gradient_release,
        ("optimizer", "max_grad_norm", "gradient_accumulation_steps", "global_batch_size"),
    ),
    Rule(check_package, ("optimizer",)),
    Rule(check_resumable, ("optimizer", "checkpoint")),
    Rule(check_kill_file, ("kill_file", "output_dir")),
    Rule(check_resume, ("resume",)),
)


# --- legal, and worth saying ---------------------------------------------------------------------


def notes(config: TrainConfig) -> list[str]:
    """Values that surprise."""
    found = []
    if config.epochs is not None and config.max_steps is not None:
        both = f"epochs {config.epochs:g} and max_steps {config.max_steps}"
        found.append(f"{both} are both given: whichever ends first")
    if isinstance(config.model, HuggingFaceModelConfig) and config.model.trust_remote_code:
        found.append("Python code that comes with the model is run: model.trust_remote_code")
    found += schedule_notes(config)
    return found
