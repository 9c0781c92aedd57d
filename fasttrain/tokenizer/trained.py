"""A tokenizer trained on the run's own text: byte-level BPE (Sennrich et al., arXiv 1508.07909)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fasttrain.config.errors import Problem, UserError
from fasttrain.config.schema.tokenizer import TrainedTokenizerConfig
from fasttrain.core.interfaces import LoadedData, TokenizerFactory
from fasttrain.tokenizer.chat_template import set_chat_template

END_OF_TEXT, TURN_START, TURN_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BYTES = 256


class TrainedTokenizerFactory(TokenizerFactory):
    """Deterministic: the same text in the same order gives the same tokenizer."""

    Config = TrainedTokenizerConfig

    def build(self, *, model_section: Any, data: LoadedData) -> Any:
        """A PreTrainedTokenizerFast, saved and loaded as any other; its eos is <|im_end|>."""
        least = BYTES + len(SPECIAL_TOKENS)
        if self.config.vocab_size < least:
            what = f"{self.config.vocab_size} is too small: {BYTES} bytes and "
            what += f"{len(SPECIAL_TOKENS)} special tokens need {least}."
            raise UserError(Problem(key="tokenizer.vocab_size", what=what))
        texts = first_characters(data.texts(), self.config.max_characters)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=train_bpe(texts, self.config.vocab_size),
            eos_token=TURN_END,
            pad_token=END_OF_TEXT,
            extra_special_tokens=[TURN_START],
        )
        set_chat_template(tokenizer, self.config.chat_template or "chatml", needed=True)
        return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with at most `vocab_size` tokens, the special ones first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        # All bytes, so that any text can be written; sorted, so that ids do not vary.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def first_characters(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The texts up to `limit` characters in all, the last one cut."""
    for text in texts:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return
