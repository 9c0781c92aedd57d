"""`fasttrain generate`: ask what was trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttrain.cli.quiet import quiet_third_parties
from fasttrain.config.errors import Problem, UserError

if TYPE_CHECKING:
    from fasttrain.core.interfaces import LanguageModel

EXPORT = "model"  # where a run writes the model for transformers
ADAPTERS = "adapter_config.json"


def generate(run_dir: str, prompt: str, *, max_new_tokens: int) -> None:
    """Print the model's greedy answer to `prompt`, put as a user's turn where it learnt chats."""
    directory = find_export(Path(run_dir))
    quiet_third_parties()
    from fasttrain.callbacks.prompts import chat_prompt
    from fasttrain.runtime.log import escape_controls

    model, tokenizer = load_export(directory)
    [text] = model.generate(
        [chat_prompt(tokenizer, prompt)], tokenizer=tokenizer, max_new_tokens=max_new_tokens
    )
    for line in text.split("\n"):
        print("\t".join(map(escape_controls, line.split("\t"))))


def find_export(run_dir: Path) -> Path:
    """The model of a run directory, or the directory itself where it is a model."""
    for directory in (run_dir / EXPORT, run_dir):
        if any((directory / name).is_file() for name in ("config.json", ADAPTERS)):
            return directory
    if not run_dir.is_dir():
        raise UserError(Problem(where=str(run_dir), what="there is no such directory."))
    raise UserError(
        Problem(
            where=str(run_dir),
            what=f"no model is in it: neither {EXPORT}/config.json nor {EXPORT}/{ADAPTERS}.",
            hint="A run writes it when it ends; `checkpoint: [{type: huggingface}]` asks for it.",
        )
    )


def load_export(directory: Path) -> tuple[LanguageModel, Any]:
    """The exported model on the best device here, and its tokenizer."""
    from fasttrain.config.registry import MODELS, TOKENIZERS
    from fasttrain.config.schema.model import HuggingFaceModelConfig
    from fasttrain.config.schema.tokenizer import HuggingFaceTokenizerConfig
    from fasttrain.core.interfaces import LoadedData
    from fasttrain.runtime.device import choose_device
    from fasttrain.runtime.precision import choose_precision

    class NoData(LoadedData):
        """The tokenizer was made; it has no data to look at."""

        has_conversations = False

        def texts(self) -> Iterator[str]:
            return iter(())

    section = HuggingFaceModelConfig(name_or_path=str(directory))
    if (directory / ADAPTERS).is_file():
        section = base_of_adapters(directory)
    tokenizer = TOKENIZERS.component("huggingface")(
        HuggingFaceTokenizerConfig(name_or_path=str(directory))
    ).build(model_section=section, data=NoData())
    device = choose_device("auto")
    model = MODELS.component("huggingface")(section).build(
        tokenizer=tokenizer, precision=choose_precision("auto", device), device=device
    )
    if (directory / ADAPTERS).is_file():
        model = with_adapters(model, directory)
    return model, tokenizer


def base_of_adapters(directory: Path) -> Any:
    """The `model:` section of the model that the adapters belong to, as they name it."""
    from fasttrain.config.schema.model import HuggingFaceModelConfig

    path = directory / ADAPTERS
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        base, revision = values["base_model_name_or_path"], values.get("revision")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            Problem(where=str(path), what=f"it names no base model ({type(error).__name__}).")
        ) from error
    if not base:
        raise UserError(
            Problem(
                where=str(path),
                key="base_model_name_or_path",
                what="the adapters do not say which model they belong to.",
                hint="Write its directory or hub name there.",
            )
        )
    return HuggingFaceModelConfig(name_or_path=base, revision=revision)


def with_adapters(model: LanguageModel, directory: Path) -> LanguageModel:
    """The base model with its adapters."""
    from fasttrain.config.registry import TRANSFORMS
    from fasttrain.config.schema.model import LoraConfig
    from fasttrain.core.kernel_plan import KernelPlan

    transform = TRANSFORMS.component("lora")(LoraConfig(adapter_path=str(directory)))
    changed: LanguageModel = transform.apply(model, plan=KernelPlan())
    return changed
