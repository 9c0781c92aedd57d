"""Which parameters decay, and that each is stepped once."""

import pytest
import torch
from torch import nn

from fasttrain.config.errors import UserError
from fasttrain.core.parameter_groups import parameter_groups


class Small(nn.Module):
    def __init__(self, *, tied):
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 4)
        self.input_norm = nn.RMSNorm(4)
        self.proj = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 10, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight


def names_by_decay(model):
    groups = parameter_groups(model, learning_rate=1e-3, weight_decay=0.1)
    return {group.weight_decay: set(group.names) for group in groups}


def test_matrices_decay_and_norms_biases_embeddings_do_not():
    assert names_by_decay(Small(tied=False)) == {
        0.1: {"proj.weight", "lm_head.weight"},
        0.0: {"embed_tokens.weight", "input_norm.weight", "proj.bias"},
    }


def test_a_tied_head_is_one_parameter_and_an_embedding():
    model = Small(tied=True)
    assert names_by_decay(model) == {
        0.1: {"proj.weight"},
        0.0: {"embed_tokens.weight", "input_norm.weight", "proj.bias"},
    }


def test_a_tied_head_that_comes_first_is_an_embedding_too():
    head = nn.Linear(4, 10, bias=False)
    embedding = nn.Embedding(10, 4)
    embedding.weight = head.weight
    model = nn.Sequential(head, embedding)
    assert names_by_decay(model) == {0.0: {"0.weight"}}


def test_frozen_parameters_are_left_out():
    model = Small(tied=False).requires_grad_(False)
    model.proj.weight.requires_grad_(True)
    (group,) = parameter_groups(model, learning_rate=1e-3, weight_decay=0.1)
    assert group.names == ("proj.weight",)
    assert group.parameters == (model.proj.weight,)
    assert group.learning_rate == 1e-3


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(UserError, match="model: none of its parameters is trainable"):
        parameter_groups(Small(tied=False).requires_grad_(False), learning_rate=1, weight_decay=0)


def test_a_real_llama_is_split_by_the_rule():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    decays = names_by_decay(model)
    assert all("proj" in name for name in decays[0.1])
    assert len(decays[0.1]) == 7
    assert decays[0.0] == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
    }
