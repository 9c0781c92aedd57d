"""`tokenizer:`"""

from __future__ import annotations

from typing import Literal

from fasttrain.config.schema.base import ComponentSection, LocalPath, PositiveInt


class TokenizerSection(ComponentSection):
    """What every tokenizer section has."""

    chat_template: str | None = None
    """A built-in template's name (`chatml`), a path to a .jinja file, or the template itself.
    Default: the tokenizer's own. A tokenizer without one is an error where the data are chats."""


class HuggingFaceTokenizerConfig(TokenizerSection):
    """The tokenizer that belongs to the model, or another by directory or hub name."""

    type: Literal["huggingface"] = "huggingface"
    name_or_path: LocalPath | None = None
    """Directory, or name on the hub. Default: the model's."""
    revision: str | None = None
    """Branch, tag or commit on the hub. Default: the model's."""


class TrainedTokenizerConfig(TokenizerSection):
    """A byte-level BPE tokenizer trained on the run's training text, for models from scratch."""

    type: Literal["trained"] = "trained"
    vocab_size: PositiveInt = 8192
    """Tokens in all, special ones and the 256 bytes included. A small text may yield fewer."""
    max_characters: PositiveInt = 50_000_000
    """Characters of text read for the training of the tokenizer."""
