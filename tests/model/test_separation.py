"""Documents in one batch never meet: each comes out as transformers computes it alone."""

import copy

import pytest
import torch
from model.tiny_models import (
    CONFIGS,
    LENGTHS,
    PADDED_ONLY,
    assert_same_gradients,
    causal_lm,
    documents,
    eager_copy,
    gradients,
    language_model,
    losses_alone,
    packed,
)

from fasttrain.config.errors import UserError
from fasttrain.config.schema.model import RandomModelConfig
from fasttrain.model.hf import as_language_model
from fasttrain.model.packed_attention import IMPLEMENTATION

LOSS_RTOL = 1e-5


def assert_as_alone(architecture, attention, **overrides):
    plain = causal_lm(architecture, **overrides)
    reference = eager_copy(plain)
    model = as_language_model(plain, RandomModelConfig(attention=attention))
    docs = documents()
    loss = model.token_losses(packed(docs))
    expected = losses_alone(reference, docs)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=LOSS_RTOL, atol=0)
    assert_same_gradients(gradients(model.causal_lm), gradients(reference))
    return model


@pytest.mark.parametrize("architecture", CONFIGS)
def test_packed_is_as_alone(architecture):
    model = assert_as_alone(architecture, "auto")
    expected = "padded" if architecture in PADDED_ONLY else "per_document"
    assert model.separation.kind == expected, model.separation.reason
    assert f"attention {expected} (" in model.describe()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mixtral", "gpt2", "opt"])
def test_padded_is_as_alone(architecture):
    model = assert_as_alone(architecture, "padded")
    assert model.separation.kind == "padded"


@pytest.mark.parametrize("attention", ["per_document", "padded"])
def test_a_changed_document_changes_no_other(attention):
    model = language_model("gemma2", attention=attention)
    docs = documents()
    changed = [*docs[:2], documents(LENGTHS, seed=2)[2], *docs[3:]]
    with torch.no_grad():
        before = model.logits(packed(docs)).split(LENGTHS)
        after = model.logits(packed(changed)).split(LENGTHS)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [
        *(True, True, False, True, True)
    ]


@pytest.mark.parametrize("attention", ["per_document", "padded"])
def test_long_documents_do_not_change_the_positions_of_short_ones(attention):
    """longrope chooses the frequencies of a whole batch by its longest sequence."""
    factors = [1.0 + i for i in range(4)]
    rope = {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": [8 * factor for factor in factors],
        "rope_theta": 1e4,
    }
    limit = {"original_max_position_embeddings": 8}
    model = assert_as_alone("phi3", attention, rope_parameters=rope | limit, **limit)
    assert model.causal_lm.model.rotary_emb.long_inv_freq is not None  # they were used


def test_attention_dropout_is_applied_while_training_only():
    model = language_model("llama", attention_dropout=0.5)
    batch = packed(documents())
    with torch.no_grad():
        assert not torch.equal(model.train().logits(batch), model.logits(batch))
        assert torch.equal(model.eval().logits(batch), model.logits(batch))


def test_bf16_autocast_stays_near_fp32():
    """fp32 weights under autocast, as on a GPU. bf16 keeps 8 bits: 2 layers give a few percent."""
    model = language_model("llama")
    batch = packed(documents())
    exact = model.token_losses(batch, reduction="none")
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.token_losses(batch, reduction="none")
        mixed.sum().backward()
    assert mixed.dtype == torch.float32
    assert (mixed - exact).norm() <= 3e-2 * exact.norm()
    assert all(g.dtype == torch.float32 for g in gradients(model).values())


def test_bf16_weights_pass_the_check():
    model = language_model("llama", dtype=torch.bfloat16)
    assert model.separation.kind == "per_document"
    assert model.token_losses(packed(documents())).dtype == torch.float32


# --- the choice ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("bloom", "BloomForCausalLM does not take its attention from transformers' table"),
        ("mamba", "MambaForCausalLM does not take its attention from transformers' table"),
    ],
)
def test_per_document_by_name_is_an_error_where_it_cannot_serve(architecture, reason):
    with pytest.raises(UserError, match=r"model\.attention: 'per_document' can't keep") as error:
        language_model(architecture, attention="per_document")
    assert reason in str(error.value)


def test_a_window_that_attention_is_not_told_of_is_noticed():
    """No probe of a few tokens could show it: the window is longer."""
    model = language_model("llama", sliding_window=32)
    assert model.separation.kind == "padded"
    assert "layer 0 has the sliding window 32, its attention asks for None" in model.describe()


def test_a_model_that_mixes_the_tokens_of_a_batch_is_refused():
    model = causal_lm("llama")
    model.model.layers[0].mlp.register_forward_hook(lambda _m, _a, out: out + out.mean((0, 1)))
    with pytest.raises(UserError, match="'padded' can't keep this model's documents apart"):
        as_language_model(model, RandomModelConfig())


def test_a_leak_between_packed_documents_is_noticed():
    """Mixing along the sequence, forwards only: rows of their own are safe, packs are not."""
    model = causal_lm("llama")

    def mix_forwards(_module, _args, out):
        return out + out.cumsum(1) / torch.arange(1, out.shape[1] + 1)[:, None]

    model.model.layers[0].mlp.register_forward_hook(mix_forwards)
    model = as_language_model(model, RandomModelConfig())
    assert model.separation.kind == "padded"
    assert "comes out otherwise than alone" in model.separation.reason


def test_the_check_leaves_no_trace():
    model = causal_lm("llama").train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    as_language_model(model, RandomModelConfig())
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.config._attn_implementation == IMPLEMENTATION
