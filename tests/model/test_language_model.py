"""Losses, logits, writing and generating, against plain transformers."""

import json

import pytest
import torch
from model.tiny_models import (
    LENGTHS,
    VOCAB_SIZE,
    causal_lm,
    documents,
    eager_copy,
    gradients,
    language_model,
    packed,
    tokenizer,
)
from toys import batch_of, document
from transformers import AutoModelForCausalLM

from fasttrain.config.errors import UserError
from fasttrain.config.schema.model import RandomModelConfig
from fasttrain.model.head import Head, find_head
from fasttrain.model.hf import as_language_model
from fasttrain.model.packed_attention import IMPLEMENTATION

# Architecture and overrides, and the scale and cap of its head.
HEADS = {
    "plain": ("llama", {}, 1.0, None),
    "tied": ("llama", {"tie_word_embeddings": True}, 1.0, None),
    "with bias": ("phi", {}, 1.0, None),
    "capped": ("gemma2", {"final_logit_softcapping": 3.0}, 1.0, 3.0),
    "cap of a trained size": ("gemma2", {}, 1.0, 30.0),
    "cap switched off": ("gemma2", {"final_logit_softcapping": None}, 1.0, None),
    "divided": ("granite", {"logits_scaling": 8.0}, 1 / 8, None),
    "multiplied": ("cohere2", {"logit_scale": 0.25}, 0.25, None),
}


def own_logits(model, docs):
    return torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids, _ in docs])


@pytest.mark.parametrize("case", HEADS)
def test_logits_are_those_of_transformers(case):
    architecture, overrides, scale, softcap = HEADS[case]
    plain = causal_lm(architecture, **overrides)
    reference = eager_copy(plain)
    model = as_language_model(plain, RandomModelConfig())
    docs = documents()
    logits = model.logits(packed(docs))
    assert logits.shape == (sum(LENGTHS), VOCAB_SIZE)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, own_logits(reference, docs), rtol=1e-5, atol=1e-5)
    assert model.head.scale == pytest.approx(scale)
    assert model.head.softcap == softcap


@pytest.mark.parametrize("case", HEADS)
def test_the_head_is_data_enough_to_compute_logits(case):
    """What a fused loss will see: weight, bias, scale and softcap."""
    architecture, overrides, *_ = HEADS[case]
    head = language_model(architecture, **overrides).head
    hidden = torch.randn(3, 32)
    expected = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    expected = expected * head.scale
    if head.softcap is not None:
        expected = head.softcap * torch.tanh(expected / head.softcap)
    torch.testing.assert_close(head.logits(hidden), expected, rtol=1e-5, atol=1e-5)


def test_a_head_of_another_kind_is_refused():
    plain = causal_lm()
    plain.lm_head = torch.nn.Sequential(torch.nn.Linear(32, VOCAB_SIZE))
    with pytest.raises(UserError, match="LlamaForCausalLM does not end in a linear layer"):
        as_language_model(plain, RandomModelConfig())


def test_logits_that_the_config_does_not_explain_are_refused():
    plain = causal_lm()
    plain.lm_head.register_forward_hook(lambda _module, _args, logits: logits.sin())
    assert isinstance(find_head(causal_lm()), Head)
    assert find_head(plain) is not None  # a hook on the head belongs to the head
    plain.register_forward_hook(lambda _m, _a, out: out.__class__(logits=out.logits.sin()))
    assert find_head(plain) is None


# --- losses -------------------------------------------------------------------------------------


def test_losses_of_supervised_tokens_only():
    model = language_model()
    batch = packed(documents())
    each = model.token_losses(batch, reduction="none")
    assert each.shape == (batch.num_supervised,)
    everywhere = torch.nn.functional.cross_entropy(
        model.logits(batch), batch.labels, reduction="none"
    )
    torch.testing.assert_close(each, everywhere[batch.supervised_index], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.token_losses(batch), each.sum(), rtol=1e-6, atol=0)


def test_unsupervised_rows_never_meet_the_head():
    model = language_model()
    rows = []
    model.head.layer.register_forward_hook(lambda _m, args, _o: rows.append(args[0].shape[0]))
    batch = packed(documents())
    model.token_losses(batch)
    assert rows == [batch.num_supervised]
    assert batch.num_supervised < batch.num_tokens


def test_the_loss_is_computed_in_one_forward_of_the_module():
    """So that hooks on it (autocast, gathering of sharded weights) apply to body, head and loss."""
    model = language_model()
    seen = []
    model.register_forward_hook(lambda _m, _a, output: seen.append(output))
    loss = model.token_losses(packed(documents()))
    assert len(seen) == 1
    assert seen[0] is loss


def test_nothing_supervised_is_a_loss_of_zero_with_zero_gradients():
    model = language_model()
    batch = batch_of(document([5, 6, 7], [False] * 3))
    loss = model.token_losses(batch)
    loss.backward()
    assert loss.item() == 0
    assert model.token_losses(batch, reduction="none").shape == (0,)
    assert all(not g.any() for g in gradients(model).values())


# --- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mixtral", "gpt2", "bloom"])
@pytest.mark.parametrize("tied", [True, False])
def test_plain_transformers_reads_what_was_written(tmp_path, architecture, tied):
    model = language_model(architecture, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, dtype=None)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    docs = documents()
    torch.testing.assert_close(
        own_logits(again, docs), model.logits(packed(docs)), rtol=1e-5, atol=1e-5
    )
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("tied", [True, False])
def test_another_dtype(tmp_path, tied):
    model = language_model("llama", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    ours = model.causal_lm.state_dict()
    for name, value in again.state_dict().items():
        assert torch.equal(value, ours[name].bfloat16())
    size = (tmp_path / "model.safetensors").stat().st_size
    stored = sum(p.numel() for p in model.parameters())  # a tied weight counts once
    assert 2 * stored < size < 2 * stored + 8192
    assert model.causal_lm.dtype == torch.float32


def test_the_written_config_knows_nothing_of_us(tmp_path):
    language_model("gemma2").save_pretrained(tmp_path, dtype=torch.float32)
    text = (tmp_path / "config.json").read_text()
    assert IMPLEMENTATION not in text
    assert "attn_implementation" not in json.loads(text)


# --- generating ---------------------------------------------------------------------------------


def greedily(model, ids, count):
    """One token at a time without a cache."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 2:
            break
    return ids


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt2", "bloom", "mamba"])
def test_generation_is_greedy(architecture):
    plain = causal_lm(architecture)
    reference = eager_copy(plain).eval()
    model = as_language_model(plain, RandomModelConfig())
    prompts = [[1, 5, 9], [1, 40, 41, 42, 43, 44, 45]]
    texts = [" ".join(f"w{i}" for i in ids[1:]) for ids in prompts]
    words = tokenizer(chat_template="{{ messages }}")
    answers = model.generate(texts, tokenizer=words, max_new_tokens=6)
    for ids, answer in zip(prompts, answers, strict=True):
        expected = greedily(reference, ids[1:], 6)[len(ids) - 1 :]
        assert answer == words.decode(expected, skip_special_tokens=True)


def test_generation_stops_at_the_end_token():
    """A head that always says 2, the tokenizer's end."""
    model = language_model("phi")
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
        model.head.bias[2] = 1.0
    model.causal_lm.generation_config.eos_token_id = 5  # another end that the model names itself
    words = tokenizer()
    assert model.generate(["w7"], tokenizer=words, max_new_tokens=50) == [""]
    with torch.no_grad():
        model.head.bias[11] = 2.0
    assert model.generate(["w7"], tokenizer=words, max_new_tokens=3) == ["w11 w11 w11"]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_generation_stops_at_the_last_position(architecture):
    model = language_model(architecture)
    model.causal_lm.generation_config.eos_token_id = None
    words = tokenizer()
    words.eos_token = "w50"
    with torch.no_grad():
        model.head.weight[50].zero_()
    limit = 64
    for length, room in ((limit - 3, 3), (limit, 0), (limit + 5, 0)):
        [answer] = model.generate(["w7 " * length], tokenizer=words, max_new_tokens=9)
        assert len(answer.split()) <= room
    assert model.generate([""], tokenizer=words, max_new_tokens=2) != [""]


def test_generation_leaves_the_model_as_it_was():
    model = language_model("llama").train()
    model.causal_lm.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    batch = packed(documents())
    before = model.token_losses(batch)
    state = torch.get_rng_state()
    model.generate(["w5 w6"], tokenizer=tokenizer(), max_new_tokens=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.token_losses(batch), before)
    assert model.causal_lm.config._attn_implementation == IMPLEMENTATION
