"""Whether the paths of a config can serve: where the run writes, what the model is read from."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from typing import Any

from fasttrain.config.data_rules import similar
from fasttrain.config.errors import Problem
from fasttrain.config.normalise import looks_like_path
from fasttrain.config.schema.data import FileSourceConfig
from fasttrain.config.schema.model import HuggingFaceModelConfig, LoraConfig
from fasttrain.config.schema.root import TrainConfig
from fasttrain.config.schema.tokenizer import HuggingFaceTokenizerConfig

# --- what is written -----------------------------------------------------------------------------


def check_output_dir(config: TrainConfig, name: str) -> Iterator[Problem]:
    """The run directory can be written, and holds nothing that the run reads."""
    written = config.output_dir or f"runs/{name}"
    if not written.isprintable():
        yield Problem(f"not a path (got {written!r}).", key="output_dir")
        return
    path = os.path.realpath(written)
    if path == os.path.realpath("/"):
        yield Problem(f"the root directory (got '{written}').", key="output_dir")
    elif os.path.exists(path) and not os.path.isdir(path):
        yield Problem(f"a file is in the way (got '{written}').", key="output_dir")
    elif blocker := _unwritable(path):
        what = f"cannot be written: {blocker} (got '{written}')."
        yield Problem(what, key="output_dir", hint="Give another output_dir.")
    else:
        yield from _overlap_with_inputs(config, written, path)


def _unwritable(path: str) -> str | None:
    """Why a directory could not be made there, or used; asks the nearest one that exists."""
    parent = path
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        return f"'{parent}' is a file"
    if not os.access(parent, os.W_OK | os.X_OK):
        return f"no permission to write in '{parent}'"
    return None


def _overlap_with_inputs(config: TrainConfig, written: str, path: str) -> Iterator[Problem]:
    for directory, whole in _input_directories(config):
        inside = whole and path.startswith(os.path.join(directory, ""))
        if path == directory or inside:
            relation = "inside a directory" if inside else "the directory"
            what = f"{relation} that the run reads (got '{written}', which meets '{directory}')."
            yield Problem(what, key="output_dir", hint="Give another output_dir.")
            return


def _input_directories(config: TrainConfig) -> Iterator[tuple[str, bool]]:
    """(directory, whether all below it is read too)"""
    for source in (*config.data.sources, *config.data.eval_sources):
        if isinstance(source, FileSourceConfig):
            fixed = source.path.split("**")[0]
            if os.path.isdir(source.path) or "**" in source.path:
                yield os.path.realpath(fixed), True
            elif not glob.has_magic(os.path.dirname(source.path)):
                yield os.path.realpath(os.path.dirname(source.path)), False
    model = config.model
    if isinstance(model, HuggingFaceModelConfig) and os.path.isdir(model.name_or_path):
        yield os.path.realpath(model.name_or_path), False


def check_kill_file(config: TrainConfig) -> Iterator[Problem]:
    """Somebody must be able to make the kill file."""
    if config.kill_file is None:
        return
    directory = os.path.dirname(config.kill_file)
    in_run = config.output_dir is not None and _is_below(directory, config.output_dir)
    if directory and not os.path.isdir(directory) and not in_run:
        what = f"there is no directory '{directory}' (got '{config.kill_file}')."
        yield Problem(what, key="kill_file", hint="Make it, or leave kill_file out.")


def _is_below(path: str, directory: str) -> bool:
    whole = os.path.realpath(directory)
    return os.path.realpath(path) == whole or os.path.realpath(path).startswith(f"{whole}/")


def check_resume(config: TrainConfig) -> Iterator[Problem]:
    """A checkpoint to go on from is there."""
    if config.resume not in ("auto", "never") and not os.path.isdir(config.resume):
        what = f"no such checkpoint (got '{config.resume}', expected auto, never or a directory)."
        yield Problem(what, key="resume", hint=similar(config.resume))


# --- what is read --------------------------------------------------------------------------------


def check_model_directory(config: TrainConfig) -> Iterator[Problem]:
    """A local model has a config.json and whole safetensors weights, and brings no code unasked."""
    model = config.model
    if not isinstance(model, HuggingFaceModelConfig):
        return
    path, key = model.name_or_path, "model.name_or_path"
    if not os.path.exists(path):
        if looks_like_path(path):
            what = f"no such directory (got '{path}')."
            yield Problem(what, key=key, hint=similar(path))
    elif not os.path.isdir(path):
        yield Problem(f"a file (got '{path}', expected the model's directory).", key=key)
    elif not os.path.isfile(os.path.join(path, "config.json")):
        yield Problem(f"the directory holds no config.json (got '{path}').", key=key)
    else:
        yield from _config_problems(path, model)
        yield from _weight_problems(path, key)


def _config_problems(path: str, model: HuggingFaceModelConfig) -> Iterator[Problem]:
    file = os.path.join(path, "config.json")
    settings, problem = _read_json(file)
    if problem is not None:
        yield problem
    elif "auto_map" in settings and not model.trust_remote_code:
        yield Problem(
            f"the model brings Python code of its own ('auto_map' in '{file}').",
            key="model.trust_remote_code",
            hint="Read that code; then set model.trust_remote_code=true.",
        )


def _weight_problems(path: str, key: str) -> Iterator[Problem]:
    names = os.listdir(path)
    index = os.path.join(path, "model.safetensors.index.json")
    if os.path.isfile(index):
        content, problem = _read_json(index)
        if problem is not None:
            yield problem
            return
        missing = sorted(set(content.get("weight_map", {}).values()) - set(names))
        if missing:
            what = f"{len(missing)} weight file(s) of the index are missing: {missing[0]}, …"
            yield Problem(f"{what.removesuffix(', …')} (got '{path}').", key=key)
    elif not any(name.endswith(".safetensors") for name in names):
        pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
        if pickles:
            yield Problem(
                f"the weights are pickles, which are never loaded (got '{pickles[0]}').",
                key=key,
                hint="Save them as safetensors: model.save_pretrained(DIR) in transformers.",
            )
        else:
            yield Problem(f"the directory holds no .safetensors weights (got '{path}').", key=key)


def _read_json(path: str) -> tuple[Any, Problem | None]:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).split("\n")[0]
        return {}, Problem(f"cannot be read ({reason}).", where=path)
    if not isinstance(content, dict):
        return {}, Problem("not a JSON object.", where=path)
    return content, None


def check_referenced_paths(config: TrainConfig) -> Iterator[Problem]:
    """Tokenizer, chat template and adapters that look like paths are there."""
    tokenizer = config.tokenizer
    template = tokenizer.chat_template
    if template and template.endswith((".jinja", ".jinja2")) and not os.path.isfile(template):
        what = f"no such file (got '{template}')."
        yield Problem(what, key="tokenizer.chat_template", hint=similar(template))
    if isinstance(tokenizer, HuggingFaceTokenizerConfig):
        name = tokenizer.name_or_path
        if name and looks_like_path(name) and not os.path.exists(name):
            what = f"no such directory (got '{name}')."
            yield Problem(what, key="tokenizer.name_or_path", hint=similar(name))
    for index, section in enumerate(config.model.transforms):
        if isinstance(section, LoraConfig) and section.adapter_path is not None:
            yield from _adapter_problems(section.adapter_path, index)


def _adapter_problems(path: str, index: int) -> Iterator[Problem]:
    if not os.path.isfile(os.path.join(path, "adapter_config.json")):
        what = (
            f"no adapters are there (got '{path}', expected a directory with adapter_config.json)."
        )
        key = f"model.transforms[{index}].adapter_path"
        yield Problem(what, key=key, hint="" if os.path.isdir(path) else similar(path))
