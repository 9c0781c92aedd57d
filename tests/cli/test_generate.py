"""`fasttrain generate`: a model on the disk answers."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toys import batch_of, document
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fasttrain.cli import app
from fasttrain.cli.generate import find_export, load_export

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The command quiets its own process; this one goes on to other tests."""
    monkeypatch.setattr("fasttrain.cli.generate.quiet_third_parties", lambda: None)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run directory with a Llama of random weights."""
    directory = tmp_path_factory.mktemp("run") / "model"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE({c: i for i, c in enumerate(["<end>", *alphabet])}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<end>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=128,
        )
    )
    model.save_pretrained(directory)
    return directory.parent


def test_the_model_of_a_run_answers_a_question_in_its_chat_template(exported, capsys, monkeypatch):
    asked = []
    from fasttrain.model.language_model import HFLanguageModel

    def generate(self, prompts, *, tokenizer, max_new_tokens):
        asked.append((prompts, max_new_tokens))
        return ["four\n\tand\x1b[2J"]

    monkeypatch.setattr(HFLanguageModel, "generate", generate)
    command = ["generate", str(exported), "two and two?", "--max-new-tokens", "7"]
    assert app.exit_code(command) == 0
    assert asked == [(["<user>two and two?<assistant>"], 7)]
    assert capsys.readouterr().out == "four\n\tand\\x1b[2J\n"


def test_a_model_directory_will_do_and_it_writes_no_more_than_asked(exported, capsys):
    for path in (exported, exported / "model"):
        assert app.exit_code(["generate", str(path), "hi", "--max-new-tokens", "3"]) == 0
    shown = capsys.readouterr()
    first, second = shown.out.splitlines()
    assert first == second and 1 <= len(first.encode()) <= 3 * len("\\x00")
    assert shown.err == ""


def test_a_directory_without_a_model_is_the_users_mistake(tmp_path, capsys):
    assert app.exit_code(["generate", str(tmp_path), "hi"]) == 2
    assert "no model is in it" in capsys.readouterr().err
    assert app.exit_code(["generate", str(tmp_path / "absent"), "hi"]) == 2
    assert "absent: there is no such directory." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "names no base model (JSONDecodeError)"),
        ("[]", "names no base model (TypeError)"),
        (json.dumps({"base_model_name_or_path": None}), "do not say which model they belong to"),
    ],
)
def test_adapters_that_name_no_model_are_refused(tmp_path, capsys, content, message):
    (tmp_path / "adapter_config.json").write_text(content)
    assert app.exit_code(["generate", str(tmp_path), "hi"]) == 2
    assert message in capsys.readouterr().err


def test_adapters_answer_on_top_of_the_model_they_name(exported, tmp_path):
    peft = pytest.importorskip("peft")
    base = LlamaForCausalLM.from_pretrained(exported / "model")
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast.from_pretrained(exported / "model").save_pretrained(tmp_path / "model")

    model, _ = load_export(find_export(tmp_path))
    ids = [5, 6, 7, 8]
    with torch.no_grad():
        expected = adapted(torch.tensor([ids])).logits[0]
        found = model.eval().logits(batch_of(document(ids)))
    torch.testing.assert_close(found, expected)
