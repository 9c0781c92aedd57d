"""Tokenizers from disk, and one line for each way in which there is none."""

import json
import shutil

import chats
import pytest

from fasttrain.config.errors import UserError
from fasttrain.config.schema.model import HuggingFaceModelConfig, RandomModelConfig
from fasttrain.config.schema.tokenizer import HuggingFaceTokenizerConfig
from fasttrain.tokenizer.hf import HuggingFaceTokenizerFactory


class Loaded:
    """Rows that need a chat template, or not."""

    def __init__(self, has_conversations=True):
        self.has_conversations = has_conversations

    def texts(self):
        return iter(())


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "model"
    chats.tokenizer(chats.CHATML).save_pretrained(path)
    return path


def build(model=None, *, conversations=True, **options):
    factory = HuggingFaceTokenizerFactory(HuggingFaceTokenizerConfig(**options))
    section = RandomModelConfig() if model is None else HuggingFaceModelConfig(name_or_path=model)
    return factory.build(model_section=section, data=Loaded(conversations))


def refusal(*args, **options):
    with pytest.raises(UserError) as caught:
        build(*args, **options)
    [line] = str(caught.value).splitlines()
    return line


def test_the_models_own_is_the_default(directory):
    tokenizer = build(str(directory))
    assert tokenizer.chat_template == chats.CHATML.template
    text = "The answer is four.<|im_end|>"
    assert tokenizer.encode(text) == chats.tokenizer(chats.CHATML).encode(text)


def test_another_can_be_named(directory):
    assert build(name_or_path=str(directory)).eos_token == "<|im_end|>"
    assert build("/no/such/model", name_or_path=str(directory)).eos_token == "<|im_end|>"


def test_a_template_of_the_config_replaces_its_own(directory):
    tokenizer = build(str(directory), chat_template="{{ messages[0].content }}")
    assert tokenizer.chat_template == "{{ messages[0].content }}"


def test_a_model_without_tokenizer_needs_one_named():
    assert "tokenizer.name_or_path: model.type random" in refusal()
    assert "tokenizer.type: trained" in refusal()


def test_a_directory_that_is_not_there(tmp_path):
    assert refusal(f"{tmp_path}/none") == (
        f"model.name_or_path: there is no directory {tmp_path}/none."
    )
    assert "tokenizer.name_or_path: there is no" in refusal("x", name_or_path="./none")


def test_a_file_is_no_directory(directory):
    assert "is a file. Give its directory." in refusal(str(directory / "tokenizer.json"))


@pytest.mark.parametrize("content", ["", "{broken", "{}", "[1]", '{"version": "1.0"}'])
def test_a_broken_tokenizer_file(directory, content):
    (directory / "tokenizer.json").write_text(content)
    line = refusal(str(directory))
    assert line.startswith(f"model.name_or_path: no tokenizer could be loaded from {directory} (")


def test_an_empty_directory(tmp_path):
    assert "no tokenizer could be loaded" in refusal(str(tmp_path))


def test_a_name_that_is_neither_here_nor_on_the_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refusal("fasttrain-tests/no-such-model")
    assert "no tokenizer could be loaded from fasttrain-tests/no-such-model" in line
    assert "or give a local directory" in line


def test_a_tokenizer_without_eos(directory):
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["eos_token"]
    path.write_text(json.dumps(config))
    assert "has no eos_token: no text could be ended." in refusal(str(directory))


def test_a_tokenizer_without_a_chat_template(directory):
    (directory / "chat_template.jinja").unlink()
    line = refusal(str(directory))
    assert line.startswith("tokenizer.chat_template: the data are conversations")
    assert build(str(directory), conversations=False).chat_template is None
    assert build(str(directory), chat_template="chatml").chat_template


def test_pad_may_be_eos(directory):
    """Nothing is masked by the pad token's id, so that it may be any."""
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "<|im_end|>"}))
    tokenizer = build(str(directory))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_a_model_without_its_tokenizer_says_what_is_missing(directory):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    assert "Does the directory hold tokenizer.json" in refusal(str(directory))
    shutil.rmtree(directory)
