"""Names that TRL, Axolotl, LLaMA-Factory and ArcticTraining use for what fasttrain has too.

An alias is read as the real key and said aloud. Beside the real key, or with a value that has no
counterpart, it is an error; so is a name that means something fasttrain does in another way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fasttrain.components import TRANSFORM_ORDER
from fasttrain.config.errors import Problem
from fasttrain.config.explain import shown
from fasttrain.config.schema.root import DEFAULT_CHECKPOINTS
from fasttrain.config.tree import (
    Entry,
    KeyPath,
    Node,
    Origin,
    assign,
    find,
    from_plain,
    key_text,
    parse_key,
)

# alias → key; `[x]` is the entry of type x, made where it is missing
RENAMED: dict[str, str] = {
    "model_name_or_path": "model.name_or_path",
    "base_model": "model.name_or_path",
    "model_revision": "model.revision",
    "revision_of_model": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "tokenizer_name_or_path": "tokenizer.name_or_path",
    "tokenizer_config": "tokenizer.name_or_path",
    "chat_template": "tokenizer.chat_template",
    "chat_template_path": "tokenizer.chat_template",
    "max_length": "data.max_length",
    "max_seq_length": "data.max_length",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "packing": "data.packing",
    "sample_packing": "data.packing",
    "pack_samples": "data.packing",
    "data.pack_samples": "data.packing",
    "max_samples": "data.max_samples",
    "val_set_size": "data.eval_split",
    "val_size": "data.eval_split",
    "dataset_num_proc": "data.num_workers",
    "dataset_processes": "data.num_workers",
    "preprocessing_num_workers": "data.num_workers",
    "data.num_proc": "data.num_workers",
    "dataset_prepared_path": "data.cache_dir",
    "train_on_inputs": "data.train_on_prompts",
    "train_on_prompt": "data.train_on_prompts",
    "per_device_train_batch_size": "micro_batch_size",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "train_iters": "max_steps",
    "learning_rate": "optimizer.learning_rate",
    "lr": "optimizer.learning_rate",
    "optimizer.lr": "optimizer.learning_rate",
    "weight_decay": "optimizer.weight_decay",
    "adam_epsilon": "optimizer.eps",
    "optim": "optimizer.type",
    "lr_scheduler": "scheduler.type",
    "lr_scheduler_type": "scheduler.type",
    "warmup_steps": "scheduler.warmup_steps",
    "warmup_ratio": "scheduler.warmup_ratio",
    "gradient_clipping": "max_grad_norm",
    "lora_r": "model.transforms[lora].r",
    "lora_rank": "model.transforms[lora].r",
    "lora_alpha": "model.transforms[lora].alpha",
    "lora_dropout": "model.transforms[lora].dropout",
    "lora_target_modules": "model.transforms[lora].target_modules",
    "lora_target": "model.transforms[lora].target_modules",
    "lora_model_dir": "model.transforms[lora].adapter_path",
    "adapter_name_or_path": "model.transforms[lora].adapter_path",
    "save_steps": "checkpoint[sharded].every_steps",
    "save_total_limit": "checkpoint[sharded].keep",
    "logging_steps": "logging.every_steps",
    "eval_steps": "eval.every_steps",
    "eval_on_start": "eval.at_start",
    "early_stopping_patience": "callbacks[early_stopping].patience",
    "exit_iteration_this_run": "stop_after",
    "kill_switch_path": "kill_file",
}

# Names of optimizers and schedules elsewhere → ours.
VALUES: dict[str, dict[str, str]] = {
    "optimizer.type": {
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_hf": "adamw",
        "fused_adam": "adamw",
    },
    "scheduler.type": {"constant_with_warmup": "constant", "warmup_stable_decay": "wsd"},
}

# What other trainers have a key for and fasttrain does otherwise: name → what to do.
ELSEWHERE: dict[str, str] = {
    name: hint
    for names, hint in (
        (("do_train", "do_eval", "overwrite_output_dir", "plot_loss"), "Remove it."),
        (("remove_unused_columns", "group_by_length", "tf32"), "Remove it."),
        (
            ("flash_attention", "flash_attn", "sdp_attention", "attn_implementation"),
            "Remove it: attention is chosen by `model.attention` and `kernels`.",
        ),
        (("use_liger_kernel", "use_liger", "liger_plugin"), "Kernels are chosen under `kernels`."),
        (("save_strategy",), "Set `every_steps` and `at_end` of the `checkpoint` entries."),
        (("eval_strategy", "evaluation_strategy"), "Set `eval.every_steps` or `eval.at_end`."),
        (("logging_strategy",), "Set `logging.every_steps`."),
        (("template",), "The tokenizer's own template is used, or `tokenizer.chat_template`."),
        (("adam_beta1", "adam_beta2"), "Write `optimizer.betas: [0.9, 0.999]`."),
        (
            ("dataset_config", "dataset_train_split", "dataset_text_field"),
            "Write it into the source: `{name_or_path, config_name, split, columns}`.",
        ),
        (("fp16",), "fp16 needs loss scaling, which is not offered. Use `precision: bf16-mixed`."),
        (("load_in_4bit", "load_in_8bit"), "Quantised base models are not offered."),
        (("per_device_eval_batch_size",), "Evaluation uses `micro_batch_size`."),
        (("logger",), "Use `logging`."),
    )
    for name in names
}

Assigned = list[tuple[str, Any]]  # (key, value; a Node is taken as it is)


def _bf16(value: Any) -> Assigned:
    choices = {True: "bf16-mixed", False: "fp32", "auto": "auto", "full": "bf16"}
    if not isinstance(value, (bool, str)) or value not in choices:
        raise ValueError("Use `precision`.")
    return [("precision", choices[value])]


def _switch(key: str) -> Callable[[Any], Assigned]:
    """true makes the entry, false leaves it out."""

    def convert(value: Any) -> Assigned:
        if not isinstance(value, bool):
            raise ValueError("It is true or false.")
        return [(key, {})] if value else []

    return convert


def _answers_only(value: Any) -> Assigned:
    if not isinstance(value, bool):
        raise ValueError("Use `data.train_on_prompts`.")
    return [("data.train_on_prompts", not value)]


def _report_to(value: Any) -> Assigned:
    names = value if isinstance(value, list) else [value]
    unknown = [str(name) for name in names if name not in ("none", "tensorboard", None)]
    if unknown:
        raise ValueError(f"There is no tracker '{unknown[0]}'; name one under `callbacks`.")
    return [("callbacks[tensorboard]", {})] if "tensorboard" in names else []


def _lora(value: Any) -> Assigned:
    if value not in ("lora", "full", None):
        raise ValueError("There is the transform `lora`, and full training without it.")
    return [("model.transforms[lora]", {})] if value == "lora" else []


def _stage(value: Any) -> Assigned:
    methods = {"sft": "sft", "pt": "causal"}
    if value not in methods:
        raise ValueError("Use `type`.")
    return [("type", methods[value])]


def _resume(value: Any) -> Assigned:
    if isinstance(value, bool):
        return [("resume", "auto" if value else "never")]
    return [("resume", value)]


def _datasets(key: str) -> Callable[[Any], Assigned]:
    """`a,b`, a list of names, or Axolotl's list of mappings."""

    def convert(value: Any) -> Assigned:
        if isinstance(value, str):
            return [(key, [name.strip() for name in value.split(",")])]
        if not isinstance(value, list):
            raise ValueError(f"Use `{key}`.")
        return [(key, [_dataset(item) for item in value])]

    return convert


# Row formats that Axolotl names and fasttrain detects.
_FORMATS = ("alpaca", "chat_template", "completion", "sharegpt", "input_output")


def _dataset(item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    known = {"path", "type", "split", "name", "revision"}
    if "path" not in item or set(item) - known:
        raise ValueError("Write `data.sources: [{name_or_path: …}]` or `[{path: …}]`.")
    if item.get("type", "alpaca") not in _FORMATS:
        raise ValueError(f"The format '{item['type']}' has no counterpart; use `columns`.")
    rest = {"split": item.get("split"), "config_name": item.get("name")}
    rest["revision"] = item.get("revision")
    given = {key: value for key, value in rest.items() if value is not None}
    return {"name_or_path": item["path"], **given} if given else item["path"]


CONVERTED: dict[str, tuple[str, Callable[[Any], Assigned]]] = {
    "bf16": ("precision", _bf16),
    "gradient_checkpointing": (
        "model.transforms[activation_checkpoint]",
        _switch("model.transforms[activation_checkpoint]"),
    ),
    "torch_compile": ("model.transforms[compile]", _switch("model.transforms[compile]")),
    "use_peft": ("model.transforms[lora]", _switch("model.transforms[lora]")),
    "adapter": ("model.transforms[lora]", _lora),
    "finetuning_type": ("model.transforms[lora]", _lora),
    "stage": ("type", _stage),
    "report_to": ("callbacks", _report_to),
    "mask_inputs": ("data.train_on_prompts", _answers_only),
    "assistant_only_loss": ("data.train_on_prompts", _answers_only),
    "completion_only_loss": ("data.train_on_prompts", _answers_only),
    "resume_from_checkpoint": ("resume", _resume),
    "dataset_name": ("data.sources", _datasets("data.sources")),
    "dataset": ("data.sources", _datasets("data.sources")),
    "datasets": ("data.sources", _datasets("data.sources")),
    "eval_dataset": ("data.eval_sources", _datasets("data.eval_sources")),
    "test_datasets": ("data.eval_sources", _datasets("data.eval_sources")),
}

ALIASES: dict[str, str] = {**RENAMED, **{name: key for name, (key, _) in CONVERTED.items()}}


@dataclass(frozen=True)
class AliasUse:
    """One alias that was read."""

    written: str
    read_as: str
    where: str

    def __str__(self) -> str:
        return f"read '{self.written}' as {self.read_as}"


def apply_aliases(root: Node, problems: list[Problem]) -> list[AliasUse]:
    """Move every alias of one layer to its key, in place."""
    uses: list[AliasUse] = []
    given = {key for key in ALIASES.values() if find(root, _path(key)) is not None}
    for alias in [*ALIASES, *ELSEWHERE]:
        path = _path(alias)
        parent = find(root, path[:-1])
        if parent is None or not parent.is_mapping or path[-1] not in parent.value:
            continue
        node = parent.value.pop(path[-1])
        uses += read_alias(root, alias, node, given, problems)
        given.add(ALIASES.get(alias, ""))
    _order_transforms(root, uses)
    return uses + _rename_values(root)


def read_alias(
    root: Node, alias: str, node: Node, given: set[str], problems: list[Problem]
) -> list[AliasUse]:
    """Put one alias's value where it belongs. `given` are the keys that already have theirs."""
    where = node.origin.where
    if node.value is None:
        return []  # a key without a value gives nothing
    if alias in ELSEWHERE:
        problems.append(Problem("not a key here.", where, alias, ELSEWHERE[alias]))
        return []
    key = ALIASES[alias]
    is_entry = key.endswith("]")
    if key in given and not is_entry:
        what = f"says the same as '{key}', which is given too."
        problems.append(Problem(what, where, alias, "Keep one."))
        return []
    try:
        assigned = _assigned(alias, node)
    except ValueError as error:
        what = f"no counterpart (got {shown(node)})."
        problems.append(Problem(what, where, alias, str(error)))
        return []
    for target, value in assigned:
        put(root, _path(target), from_plain(value, node.origin))
    read_as = ", ".join(_shown(target, value) for target, value in assigned)
    return [AliasUse(alias, read_as or "the default", where)]


def _assigned(alias: str, node: Node) -> Assigned:
    if alias in RENAMED:
        return [(RENAMED[alias], _cleaned(RENAMED[alias], node))]
    return CONVERTED[alias][1](_value(node))


def _cleaned(key: str, node: Node) -> Node:
    """LoRA targets as Axolotl and LLaMA-Factory write them."""
    if key.endswith("target_modules") and isinstance(node.value, str):
        names = "all-linear" if node.value == "all" else node.value
        return from_plain([name.strip() for name in names.split(",")], node.origin)
    return node


def _value(node: Node) -> Any:
    """The plain value, with text where it stood as text."""
    if node.is_mapping:
        return {key: _value(part) for key, part in node.value.items()}
    return [_value(part) for part in node.value] if node.is_list else node.value


def _shown(key: str, value: Any) -> str:
    if isinstance(value, (Node, dict, list)):
        return f"'{key}'"
    text = str(value).lower() if isinstance(value, bool) else value
    return f"'{key}: {text}'"


def put(root: Node, path: KeyPath, value: Node) -> None:
    """Assign; an entry that is there already is kept, and the default checkpoints are written out
    before one of them changes. Raises LookupError as `assign` does."""
    if path[0] == "checkpoint" and len(path) > 1 and "checkpoint" not in root.value:
        entries = [entry.model_dump(exclude_unset=True) for entry in DEFAULT_CHECKPOINTS]
        named = [
            {"type": entry.type, **given}
            for entry, given in zip(DEFAULT_CHECKPOINTS, entries, strict=True)
        ]
        root.value["checkpoint"] = from_plain(named, Origin("default"))
    if isinstance(path[-1], Entry) and find(root, path) is not None:
        return
    assign(root, path, value)


def _order_transforms(root: Node, uses: list[AliasUse]) -> None:
    """Transforms that aliases made stand in the fixed order."""
    if any("model.transforms" in use.read_as for use in uses):
        transforms = find(root, ("model", "transforms"))
        assert transforms is not None
        transforms.value.sort(key=_rank)


def _rank(entry: Node) -> int:
    kind = entry.value.get("type") if entry.is_mapping else None
    name = kind.value if kind is not None else None
    return TRANSFORM_ORDER.index(name) if name in TRANSFORM_ORDER else len(TRANSFORM_ORDER)


def _rename_values(root: Node) -> list[AliasUse]:
    uses = []
    for key, names in VALUES.items():
        node = find(root, _path(key))
        if node is None or not isinstance(node.value, str) or node.value not in names:
            continue
        written, node.value = node.value, names[node.value]
        uses.append(AliasUse(f"{key}: {written}", f"'{key}: {node.value}'", node.origin.where))
    return uses


def _path(key: str) -> KeyPath:
    path = parse_key(key)
    assert path is not None
    return path


def alias_of(path: KeyPath) -> str | None:
    """The alias that a key path spells, if it is one."""
    text = key_text(path)
    return text if text in ALIASES or text in ELSEWHERE else None
