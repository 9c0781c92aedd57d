"""A tokenizer trained on the spot: deterministic, complete, and an ordinary one once saved."""

import pytest
from transformers import AutoTokenizer

from fasttrain.config.errors import UserError
from fasttrain.config.schema.model import RandomModelConfig
from fasttrain.config.schema.tokenizer import TrainedTokenizerConfig
from fasttrain.tokenizer.trained import TrainedTokenizerFactory

TEXTS = [f"def add_{n}(a, b):\n    return a + b + {n}\n" for n in range(300)]


class Loaded:
    has_conversations = True

    def __init__(self, texts=TEXTS):
        self._texts = texts

    def texts(self):
        return iter(self._texts)


def build(texts=TEXTS, **options):
    factory = TrainedTokenizerFactory(TrainedTokenizerConfig(**{"vocab_size": 400, **options}))
    return factory.build(model_section=RandomModelConfig(), data=Loaded(texts))


def test_it_writes_any_text_and_reads_it_back():
    tokenizer = build()
    for text in ("def add(a, b):\n\treturn a+b", "naïve 日本 🙂\x00\r\n", "  blanks   ", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_it_is_trained_on_the_text():
    tokenizer = build()
    assert len(tokenizer) == 400
    assert len(tokenizer.encode("    return a + b")) < 8  # of 16 characters


def test_the_same_text_gives_the_same_tokenizer():
    assert build().backend_tokenizer.to_str() == build().backend_tokenizer.to_str()
    assert build().backend_tokenizer.to_str() != build(TEXTS[:5]).backend_tokenizer.to_str()


def test_special_tokens_come_first_and_are_one_token_each():
    tokenizer = build()
    ids = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    assert ids == [0, 1, 2]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.encode("<|im_start|>a<|im_end|>")[::2] == [1, 2]


def test_it_speaks_chatml_unless_told_otherwise():
    chat = [{"role": "user", "content": "?"}]
    rendered = build().apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"
    other = build(chat_template="{{ messages[0].content }}")
    assert other.apply_chat_template(chat, tokenize=False) == "?"


def test_saved_it_is_an_ordinary_tokenizer(tmp_path):
    tokenizer = build()
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\ndef add_7(a, b)<|im_end|>\n"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.chat_template == tokenizer.chat_template
    assert (again.eos_token, again.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)


def test_no_more_text_is_read_than_asked_for():
    def endless():
        while True:
            yield "def add(a, b): return a + b\n"

    tokenizer = build(endless(), max_characters=10_000)
    assert tokenizer.eos_token == "<|im_end|>"


def test_a_small_text_yields_fewer_tokens():
    assert 259 <= len(build(["ab"], vocab_size=8192)) < 300


def test_a_vocabulary_that_cannot_hold_all_bytes():
    with pytest.raises(UserError, match=r"tokenizer.vocab_size: 258 is too small: .* need 259\."):
        build(vocab_size=258)
    assert len(build(vocab_size=259)) == 259
