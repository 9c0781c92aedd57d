"""Rotations, gated units, embeddings and attention layers are found by structure and accepted by
what they compute. (RMS norms: test_rms_norm_sites.py; whole models: test_architectures.py.)"""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from model.tiny_models import CONFIGS, causal_lm, documents, language_model, packed
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from fasttrain.core.batch import BatchProfile
from fasttrain.model.transforms.sites.embedding import find_embeddings
from fasttrain.model.transforms.sites.gated import find_geglu, find_swiglu
from fasttrain.model.transforms.sites.packed_attention import find_attention
from fasttrain.model.transforms.sites.rope import find_rope

PROFILE = BatchProfile(torch.device("cpu"), torch.float32, tokens=8, document_lengths=(2, 6))


def skeleton(architecture, **overrides):
    with torch.device("meta"):
        config = AutoConfig.for_model(architecture, **(CONFIGS[architecture] | overrides))
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("find", [find_rope, find_swiglu, find_geglu, find_embeddings])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "phi3", "cohere2"])
def test_weights_are_not_read(architecture, find):
    assert find(skeleton(architecture)) == find(causal_lm(architecture))


# --- gated units --------------------------------------------------------------------------------


class Mlp(nn.Module):
    """A user's own gated MLP, written as one would."""

    def __init__(self, activation=nn.SiLU):
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.activation = activation()

    def forward(self, x):
        return self.w2(self.activation(self.w1(x)) * self.w3(x))


class Summed(Mlp):
    def forward(self, x):
        return self.w2(self.activation(self.w1(x)) + self.w3(x))


class Swapped(Mlp):
    def forward(self, x):
        return self.w2(self.activation(self.w3(x)) * self.w1(x))


class Residual(Mlp):
    def forward(self, x):
        return x + super().forward(x)


class Dropping(Mlp):
    """In training only, as pretrained models are not when they have been loaded."""

    def forward(self, x):
        inner = self.activation(self.w1(x)) * self.w3(x)
        return self.w2(nn.functional.dropout(inner, 0.5, self.training))


class Clamped(Mlp):
    def forward(self, x):
        return self.w2(self.activation(self.w1(x).clamp(-50, 50)) * self.w3(x))


class Normed(Mlp):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(12)


def test_a_module_of_ones_own():
    model = nn.Sequential(Mlp(), Mlp(nn.GELU), Mlp(lambda: nn.GELU("tanh")))
    [silu], others = find_swiglu(model)
    exact, tanh = find_geglu(model)[0]
    assert others == []
    assert (silu.path, exact.path, tanh.path) == ("0", "1", "2")
    assert (exact.activation, tanh.activation) == ("none", "tanh")
    x = torch.randn(3, 8)
    before = [module(x) for module in model]
    for site in (silu, exact, tanh):
        site.put(model, "eager")
    for module, y in zip(model, before, strict=True):
        torch.testing.assert_close(module(x), y)
        torch.testing.assert_close(copy.deepcopy(module)(x), y)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Mlp(nn.ReLU), "Mlp: it computes something else than a gated unit"),
        (Summed(), "Summed: it computes something else"),
        (Swapped(), "Swapped: it computes something else"),
        (Residual(), "Residual: it computes something else"),
        (Normed(), "Normed: it has activation, norm beside its projections"),
        (Dropping().eval(), "Dropping: it computes something else"),
        (Mlp(lambda: nn.Sequential(nn.SiLU(), nn.Dropout(0.5))).eval(), "Mlp: it computes some"),
        (Clamped(), "Clamped: it computes something else"),
    ],
)
def test_what_only_looks_gated_is_reported(module, reason):
    sites, others = find_swiglu(nn.Sequential(module))
    assert sites == [] and find_geglu(nn.Sequential(module)) == ([], [])
    [other] = others
    assert other.reason.startswith(reason)


def test_looking_at_an_mlp_changes_nothing():
    module = Mlp()
    layers, state = dict(module.named_children()), copy.deepcopy(module.state_dict())
    model = nn.Sequential(module, Dropping())
    before = torch.get_rng_state()
    find_swiglu(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(part.training for part in module.modules())
    assert dict(module.named_children()) == layers
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


# --- embeddings ---------------------------------------------------------------------------------


class Doubled(nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


class ScaledAndShifted(nn.Embedding):
    def __init__(self):
        super().__init__(8, 4)
        self.register_buffer("embed_scale", torch.tensor(3.0))

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale + 1


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Doubled(8, 4), "Doubled: it computes something else than a look-up"),
        (ScaledAndShifted(), "ScaledAndShifted: it computes something else than a look-up"),
        (nn.Embedding(8, 4, max_norm=1.0), "Embedding: max_norm is set"),
        (nn.Embedding(8, 4, sparse=True), "Embedding: sparse is set"),
    ],
)
def test_what_is_more_than_a_look_up_is_reported(module, reason):
    sites, [other] = find_embeddings(nn.Sequential(module))
    assert sites == [] and other.reason == reason


def test_arguments_may_be_given_by_name():
    model = nn.Sequential(nn.Embedding(8, 4), Mlp())
    expected = model[0](torch.tensor([3]))
    find_embeddings(model)[0][0].put(model, "eager")
    find_swiglu(model)[0][0].put(model, "eager")
    assert torch.equal(model[0](input=torch.tensor([3])), expected)
    assert model[1](x=torch.ones(2, 8)).shape == (2, 8)


# --- rotations ----------------------------------------------------------------------------------


def rotating_otherwise(q, k, cos, sin):
    return q * cos.unsqueeze(1), k * cos.unsqueeze(1)


def test_a_rotation_of_another_kind_is_reported(monkeypatch):
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotating_otherwise)
    sites, [*others] = find_rope(skeleton("llama"))
    assert sites == [] and len(others) == 2
    assert others[0].reason == "LlamaAttention: it rotates in a way of its own"


def test_a_layer_that_rotates_by_several_functions_is_reported():
    model = language_model("deepseek_v3")
    sites, others = find_rope(model)
    assert sites == [] and len(others) == 2
    assert "it rotates by apply_rotary_pos_emb_interleave" in others[0].reason


def test_angles_that_differ_between_the_halves_are_no_site(monkeypatch):
    """As those of images among text: the second half has other positions than the first."""
    forward = modeling_llama.LlamaRotaryEmbedding.forward

    def uneven(self, x, position_ids):
        cos, sin = forward(self, x, position_ids)
        return cos * torch.linspace(1, 2, cos.shape[-1]), sin

    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", uneven)
    assert find_rope(skeleton("llama"))[0] == []


def test_no_class_and_no_global_is_touched():
    model, other = causal_lm(), causal_lm()
    function, forward = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaAttention.forward
    for site in find_rope(model)[0]:
        site.put(model, "eager")
    assert modeling_llama.apply_rotary_pos_emb is function
    assert modeling_llama.LlamaAttention.forward is forward
    assert [m for m in other.modules() if "forward" in vars(m)] == []
    # All layers of a class share one function: torch.compile makes one graph of them.
    layers = [layer.self_attn.forward.__func__ for layer in model.model.layers]
    assert layers[0] is layers[1]


def test_tables_of_16_bit_models_are_float32_where_every_layer_reads_them_as_ours_do():
    model = causal_lm(dtype=torch.bfloat16)
    x, positions = torch.ones(1, 3, 32, dtype=torch.bfloat16), torch.arange(3)[None]
    first, second = find_rope(model)[0]
    first.put(model, "eager")
    assert model.model.rotary_emb(x, positions)[0].dtype == torch.bfloat16
    second.put(model, "eager")
    assert model.model.rotary_emb(x, positions)[0].dtype == torch.float32


def test_a_patched_model_can_be_copied_and_a_pickle_of_it_does_not_load():
    model = causal_lm()
    for find in (find_rope, find_swiglu):
        for site in find(model)[0]:
            site.put(model, "eager")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)
    with pytest.raises(AttributeError, match="has_fasttrain_kernel"):
        pickle.loads(pickle.dumps(model))


# --- attention ----------------------------------------------------------------------------------


def test_what_is_known_of_an_attention_layer():
    sites, others = find_attention(language_model("gemma2"))
    assert others == []
    facts = [site.facts(PROFILE) for site in sites]
    assert [fact["window"] for fact in facts] == [True, False]
    expected = {
        "head_dim": 8,
        "value_dim": 8,
        "query_heads": 4,
        "key_heads": 2,
        "softcap": True,
        "sinks": False,
        "rows": 8,
    }
    assert facts[0] == expected | {"window": True, "document_length": 5}  # (2² + 6²) / 8
    assert find_attention(language_model("gpt_oss"))[0][0].sinks
    latent = find_attention(language_model("deepseek_v3"))[0][0]
    assert (latent.head_dim, latent.value_dim) == (12, 6)


def test_attention_that_no_kernel_serves_is_reported():
    sites, others = find_attention(language_model(attention="padded"))
    assert sites == [] and others[0].reason == "documents are padded rows (asked for)"
    for architecture, options, reason in (
        ("llama", {"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ("gpt2", {"attn_pdrop": 0.1}, "attn_dropout 0.1"),
        ("opt", {"attention_dropout": 0.1}, "dropout 0.1"),
    ):
        model = language_model(architecture, **options)
        sites, others = find_attention(model)
        assert sites == [] and reason in others[0].reason
        model.train().token_losses(packed(documents())).backward()
    assert find_attention(causal_lm()) == ([], [])  # nobody keeps documents apart in it


def test_a_layer_runs_on_the_backend_it_was_given(monkeypatch):
    model = language_model()
    seen = []

    def spy(q, k, v, cu_seqlens, **options):
        seen.append((cu_seqlens.tolist(), options["layout"].lengths, options["backend"]))
        return q

    monkeypatch.setattr("fasttrain.model.packed_attention.packed_attention", spy)
    find_attention(model)[0][1].put(model, "eager")
    model.logits(packed(documents((3, 4))))
    assert seen == [([0, 3, 7], (3, 4), "eager")]


def test_dropout_that_appears_later_is_an_error():
    model = language_model()
    find_attention(model)[0][0].put(model, "eager")
    model.causal_lm.model.layers[0].self_attn.attention_dropout = 0.5
    with pytest.raises(ValueError, match=r"LlamaAttention drops attention weights \(dropout 0.5\)"):
        model.train().token_losses(packed(documents()))


def test_documents_beyond_a_rope_limit_keep_their_own_offsets():
    """length_groups runs them apart: where documents begin must go with them."""
    config = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    model = language_model(max_position_embeddings=8, **config)
    batch = packed(documents((3, 12, 5)))
    before = model.logits(batch)
    for site in find_attention(model)[0]:
        site.put(model, "eager")
    torch.testing.assert_close(model.logits(batch), before)


def test_facts_without_lengths():
    [site, _], _ = find_attention(language_model())
    unknown = SimpleNamespace(document_lengths=(), tokens=8)
    assert "document_length" not in site.facts(unknown)
