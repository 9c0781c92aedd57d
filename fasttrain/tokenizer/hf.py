"""A tokenizer from a directory or a hub name, as transformers reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from fasttrain.config.errors import Problem, UserError
from fasttrain.config.schema.tokenizer import HuggingFaceTokenizerConfig
from fasttrain.core.interfaces import LoadedData, TokenizerFactory
from fasttrain.runtime.hub import hub_reachable
from fasttrain.tokenizer.chat_template import set_chat_template


class HuggingFaceTokenizerFactory(TokenizerFactory):
    """The model's own tokenizer, or another. It must be a fast one, with an end-of-text token."""

    Config = HuggingFaceTokenizerConfig

    def build(self, *, model_section: Any, data: LoadedData) -> Any:
        """UserError, in one line, where there is none or it can't be used."""
        key, name, revision = self._which(model_section)
        tokenizer = load_tokenizer(
            name,
            revision=revision,
            trust_remote_code=getattr(model_section, "trust_remote_code", False),
            key=key,
        )
        refuse_unusable(tokenizer, name=name, key=key)
        set_chat_template(tokenizer, self.config.chat_template, needed=data.has_conversations)
        return tokenizer

    def _which(self, model_section: Any) -> tuple[str, str, str | None]:
        """The config key that decides, the name or path, and the revision."""
        if self.config.name_or_path is not None:
            return "tokenizer.name_or_path", self.config.name_or_path, self.config.revision
        name = getattr(model_section, "name_or_path", None)
        if name is None:
            raise UserError(
                Problem(
                    key="tokenizer.name_or_path",
                    what=f"model.type {model_section.type} brings no tokenizer.",
                    hint="Name one here, or set tokenizer.type: trained.",
                )
            )
        revision = self.config.revision or getattr(model_section, "revision", None)
        return "model.name_or_path", name, revision


def load_tokenizer(name: str, *, revision: str | None, trust_remote_code: bool, key: str) -> Any:
    """The tokenizer in a directory or on the hub. UserError naming `key` where there is none."""
    path = Path(name).expanduser()
    if path.exists() and not path.is_dir():
        raise UserError(Problem(key=key, what=f"{name} is a file.", hint="Give its directory."))
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~"))):
        raise UserError(Problem(key=key, what=f"there is no directory {name}."))
    try:
        return AutoTokenizer.from_pretrained(
            str(path) if path.exists() else name,
            revision=revision,
            trust_remote_code=trust_remote_code,
            # Without it an absent network costs 49 s of retries, each printed.
            local_files_only=not path.exists() and not hub_reachable(),
        )
    # A broken file shows as nearly any type: KeyError, AttributeError, a bare Exception from Rust.
    except Exception as error:
        what = f"no tokenizer could be loaded from {name} ({type(error).__name__}: "
        what += f"{' '.join(str(error).split())[:300]})."
        hint = (
            "Does the directory hold tokenizer.json and tokenizer_config.json?"
            if path.exists()
            else "Check the name and the connection, or give a local directory."
        )
        raise UserError(Problem(key=key, what=what, hint=hint)) from error


def refuse_unusable(tokenizer: Any, *, name: str, key: str) -> None:
    """UserError unless tokens can be traced back to characters, and texts can be ended."""
    if not tokenizer.is_fast:
        what = f"the tokenizer of {name} has no fast form, which the loss mask needs."
        hint = "Use a tokenizer with a tokenizer.json."
        raise UserError(Problem(key=key, what=what, hint=hint))
    if tokenizer.eos_token_id is None:
        what = f"the tokenizer of {name} has no eos_token: no text could be ended."
        raise UserError(
            Problem(key=key, what=what, hint="Add eos_token to its tokenizer_config.json.")
        )
