"""What each parameter is, that it is stepped once, and what rules by name change."""

import pytest
import torch
from torch import nn

from fasttrain.config.errors import UserError
from fasttrain.config.schema.optimizer import OptimizerSection
from fasttrain.core.parameter_groups import parameter_groups


class Small(nn.Module):
    def __init__(self, *, tied):
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 4)
        self.embed_positions = nn.Embedding(6, 4)
        self.input_norm = nn.RMSNorm(4)
        self.proj = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 10, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight


def groups_of(model, *, head=None, **settings):
    values = {"learning_rate": 1e-3, "weight_decay": 0.1, **settings}
    return parameter_groups(model, OptimizerSection(type="any", **values), head=head)


def names_by_role(model, **settings):
    groups = groups_of(model, **settings)
    assert all(group.name == group.role for group in groups)
    assert {g.role: g.weight_decay for g in groups if g.weight_decay} == {
        group.role: 0.1 for group in groups if group.role in ("matrices", "head")
    }
    return {group.role: set(group.names) for group in groups}


def test_matrices_and_the_head_decay_and_norms_biases_embeddings_do_not():
    model = Small(tied=False)
    roles = names_by_role(model, head=model.lm_head.weight)
    assert roles == {
        "matrices": {"proj.weight"},
        "head": {"lm_head.weight"},
        "embeddings": {"embed_tokens.weight", "embed_positions.weight"},
        "vectors": {"input_norm.weight", "proj.bias"},
    }
    assert list(roles) == ["matrices", "head", "embeddings", "vectors"]


def test_a_head_that_nobody_names_is_a_matrix():
    assert "lm_head.weight" in names_by_role(Small(tied=False))["matrices"]


def test_a_tied_head_is_one_parameter_and_an_embedding():
    model = Small(tied=True)
    assert names_by_role(model, head=model.lm_head.weight) == {
        "matrices": {"proj.weight"},
        "embeddings": {"embed_tokens.weight", "embed_positions.weight"},
        "vectors": {"input_norm.weight", "proj.bias"},
    }


def test_a_tied_head_that_comes_first_is_an_embedding_too():
    head = nn.Linear(4, 10, bias=False)
    embedding = nn.Embedding(10, 4)
    embedding.weight = head.weight
    model = nn.Sequential(head, embedding)
    assert names_by_role(model, head=head.weight) == {"embeddings": {"0.weight"}}


def test_weights_of_experts_are_matrices():
    model = nn.Module()
    model.experts = nn.Parameter(torch.zeros(3, 4, 5))
    model.router_bias = nn.Parameter(torch.zeros(3))
    assert names_by_role(model) == {"matrices": {"experts"}, "vectors": {"router_bias"}}


def test_frozen_parameters_are_left_out():
    model = Small(tied=False).requires_grad_(False)
    model.proj.weight.requires_grad_(True)
    (group,) = groups_of(model)
    assert group.names == ("proj.weight",)
    assert group.parameters == (model.proj.weight,)
    assert group.learning_rate == 1e-3


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(UserError, match="model: none of its parameters is trainable"):
        groups_of(Small(tied=False).requires_grad_(False))


def test_a_real_llama_is_split_by_the_rule():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    roles = names_by_role(model, head=model.lm_head.weight)
    assert all("proj" in name for name in roles["matrices"])
    assert len(roles["matrices"]) == 7
    assert roles["embeddings"] == {"model.embed_tokens.weight"}
    assert roles["vectors"] == {
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
    }
