"""Reads a pretrained model's config and weights through transformers, and checks both.

transformers fills a tensor that is missing with random numbers and goes on; here it is an error.
Weights come from safetensors only: a .bin or .pt file is a pickle, which runs code when it is read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fasttrain.config.errors import Problem, UserError
from fasttrain.config.schema.model import HuggingFaceModelConfig
from fasttrain.model.names import did_you_mean, listed
from fasttrain.model.quiet import quiet_transformers
from fasttrain.runtime.hub import hub_reachable

log = logging.getLogger("fasttrain")

KEY = "model.name_or_path"
INDEX = "model.safetensors.index.json"


def read_config(section: HuggingFaceModelConfig) -> Any:
    """The model's transformers config, with `config_overrides`. No weights are read."""
    source = _source(section)
    with _as_user_error(section):
        config = AutoConfig.from_pretrained(
            source,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            local_files_only=not _is_directory(source) and not hub_reachable(),
        )
    if getattr(config, "quantization_config", None) is not None:
        _refuse(
            section, "its weights are quantised, and those can't be trained", "Use the original."
        )
    for key, value in section.config_overrides.items():
        _override(config, key, value)
    return config


def load_weights(
    section: HuggingFaceModelConfig, config: Any, dtype: torch.dtype
) -> PreTrainedModel:
    """The model in `dtype` on the CPU, every tensor from the files and finite."""
    source = _source(section)
    if _is_directory(source):
        check_files(Path(source))
    if config.dtype == torch.float32 and dtype != torch.float32:
        log.info("the weights are stored in float32 and rounded to %s, as precision asks", dtype)
    with _as_user_error(section), quiet_transformers():
        causal_lm, report = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            local_files_only=not _is_directory(source) and not hub_reachable(),
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, in one line
        )
    _refuse_incomplete(section, report)
    refuse_non_finite(causal_lm, section.name_or_path)
    return causal_lm


# --- before anything is read --------------------------------------------------------------------


def _is_directory(source: str) -> bool:
    return Path(source).is_dir()


def _source(section: HuggingFaceModelConfig) -> str:
    """The directory, absolute so that adapters saved later find their base, or the hub name."""
    name = section.name_or_path
    path = Path(name).expanduser()
    if path.is_file():
        _refuse(section, "it is a file", "Give the directory that holds config.json.")
    if path.is_dir():
        _check_directory(section, path)
        return str(path.resolve())
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        _refuse(section, "there is no such directory", "Check the path.")
    return name


def _check_directory(section: HuggingFaceModelConfig, path: Path) -> None:
    if (path / "config.json").is_file():
        return
    if (path / "adapter_config.json").is_file():
        hint = "Name the base model here, and this directory as adapter_path of a lora transform."
        _refuse(section, "it holds adapters, not a model", hint)
    _refuse(section, "there is no config.json in it", "Give the directory of a saved model.")


def check_files(directory: Path) -> None:
    """UserError unless the directory has whole safetensors files, and each that its index names."""
    present = {path.name for path in directory.glob("*.safetensors")}
    if not present:
        _refuse_no_safetensors(directory)
    index = directory / INDEX
    named = (
        set(json.loads(index.read_text("utf-8"))["weight_map"].values()) if index.exists() else ()
    )
    absent = sorted(set(named) - present)
    if absent:
        what = f"{listed(absent)}, which {INDEX} names, is missing."
        raise UserError(
            Problem(where=str(directory), key=KEY, what=what, hint="Download it again.")
        )
    for name in sorted(present):
        _check_size(directory / name)


def _refuse_no_safetensors(directory: Path) -> NoReturn:
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in {".bin", ".pt", ".pth"})
    if not pickles:
        what, hint = (
            "there are no weights (*.safetensors) in it.",
            "Give a saved model's directory.",
        )
    else:
        what = f"{listed(pickles)} is a pickle, which runs code when it is read."
        hint = (
            "If you trust it, convert it once: AutoModelForCausalLM.from_pretrained(DIR)"
            ".save_pretrained(NEW_DIR)."
        )
    raise UserError(Problem(where=str(directory), key=KEY, what=what, hint=hint))


def _check_size(path: Path) -> None:
    """A safetensors file is 8 bytes, the length of a JSON header; the header; then the tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if 8 + header_size > size:
            _refuse_broken(path, f"its header should take {header_size} bytes of the {size} it has")
        try:
            header = json.loads(file.read(header_size))
        except ValueError:
            _refuse_broken(path, "its header can't be read")
    header.pop("__metadata__", None)
    expected = 8 + header_size + max((t["data_offsets"][1] for t in header.values()), default=0)
    if expected != size:
        _refuse_broken(path, f"it has {size} bytes where its header describes {expected}")


def _refuse_broken(path: Path, why: str) -> NoReturn:
    what = f"the file is broken: {why}."
    raise UserError(Problem(where=str(path), key=KEY, what=what, hint="Download it again."))


def _override(config: Any, key: str, value: Any) -> None:
    if not hasattr(config, key):
        known = [name for name in vars(config) if not name.startswith("_")]
        raise UserError(
            Problem(
                key=f"model.config_overrides.{key}",
                what=f"the model's config has no '{key}'.",
                hint=did_you_mean(key, known, "See its config.json."),
            )
        )
    setattr(config, key, value)


# --- what transformers says ---------------------------------------------------------------------


@contextmanager
def _as_user_error(section: HuggingFaceModelConfig) -> Iterator[None]:
    """transformers' many ways to say that it can't load, as one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            hint = "Read its code first; then set model.trust_remote_code=true."
            _refuse(section, "it brings Python code of its own", hint, error)
        if not _is_directory(section.name_or_path) and not hub_reachable():
            why = "it is neither a directory nor in the hub's cache, and the hub can't be reached"
            _refuse(section, why, "Check the connection, or give a local directory.", error)
        hint = "Gated or private? Log in with `hf auth login`." if "gated" in text.lower() else ""
        _refuse(section, f"transformers can't load it ({text[:300]})", hint, error)


def _refuse(
    section: HuggingFaceModelConfig, why: str, hint: str, cause: Exception | None = None
) -> NoReturn:
    problem = Problem(key=KEY, what=f"'{section.name_or_path}': {why}.", hint=hint)
    raise UserError(problem) from cause


def _refuse_incomplete(section: HuggingFaceModelConfig, report: dict[str, Any]) -> None:
    problems = []
    if report["missing_keys"]:
        what = f"the weights lack {listed(sorted(report['missing_keys']))}."
        hint = "transformers would fill them with random numbers; download the model again."
        problems.append(Problem(where=section.name_or_path, key=KEY, what=what, hint=hint))
    for name, stored, expected in sorted(report["mismatched_keys"]):
        what = f"{name} is {tuple(stored)} in the weights and {tuple(expected)} by the config."
        hint = "Does config.json belong to these weights?"
        problems.append(Problem(where=section.name_or_path, key=KEY, what=what, hint=hint))
    if problems:
        raise UserError(*problems)
    if report["unexpected_keys"]:
        log.info("weights the model has no use for: %s", listed(sorted(report["unexpected_keys"])))


def refuse_non_finite(module: nn.Module, name: str) -> None:
    """UserError naming each tensor that holds NaN or infinity."""
    bad = [n for n, tensor in module.named_parameters() if not torch.isfinite(tensor).all()]
    if bad:
        what = f"NaN or infinite numbers in {listed(bad)}."
        hint = "The model is broken, or too large for the precision it is loaded in."
        raise UserError(Problem(where=name, key=KEY, what=what, hint=hint))
