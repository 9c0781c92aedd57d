"""Tiny random models of many architectures, and what plain transformers makes of documents."""

import copy

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from toys import batch_of, document
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fasttrain.config.schema.model import RandomModelConfig
from fasttrain.core.batch import IGNORED_LABEL
from fasttrain.model.hf import as_language_model

VOCAB_SIZE = 97
LENGTHS = (9, 4, 13, 1, 6)  # longer and shorter than the windows of 4 below

_SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GPT = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2}

CONFIGS = {
    "llama": _SMALL,
    "mistral": _SMALL | {"sliding_window": 4, "head_dim": 8},
    "qwen2": _SMALL
    | {
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": None,
        "max_window_layers": 1,
    },
    "qwen3": _SMALL | {"head_dim": 8},
    "gemma2": _SMALL | {"head_dim": 8, "sliding_window": 4},
    "gemma3_text": _SMALL | {"head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2},
    "phi3": _SMALL | {"sliding_window": None},
    "phi": _SMALL,
    "smollm3": _SMALL,
    "olmo2": _SMALL,
    "granite": _SMALL
    | {"logits_scaling": 8.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5},
    "cohere2": _SMALL | {"sliding_window": 4, "logit_scale": 0.25},
    "mixtral": _SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _SMALL | _MOE | {"num_experts": 4, "head_dim": 8},
    "deepseek_v3": _SMALL
    | _MOE
    | {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "num_key_value_heads": 4,
    },
    "gpt2": _GPT | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": _SMALL,
    "opt": _GPT
    | {
        "pad_token_id": 0,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "bloom": _GPT | {"pad_token_id": 0, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mamba": _GPT | {"pad_token_id": 0, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "gpt_oss": _SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}
DROPOUTS = (
    *("attention_dropout", "hidden_dropout", "dropout"),
    *("attn_pdrop", "resid_pdrop", "embd_pdrop"),
)
PADDED_ONLY = {"bloom", "mamba"}


def causal_lm(architecture="llama", *, seed=0, dtype=torch.float32, **overrides):
    """transformers' own model, without dropout unless asked for."""
    config = AutoConfig.for_model(architecture, **(CONFIGS[architecture] | overrides))
    for name in DROPOUTS:
        if hasattr(config, name) and name not in overrides:
            setattr(config, name, 0.0)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    spread_out(model, seed)
    return model


def spread_out(model, seed):
    """Weights as large as trained ones: at an initialisation of 0.02 attention is nearly uniform,
    and a wrong position or window would hardly show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def language_model(architecture="llama", *, attention="auto", **overrides):
    """The same as the trainer sees it."""
    return as_language_model(
        causal_lm(architecture, **overrides), RandomModelConfig(attention=attention)
    )


def eager_copy(model):
    """An independent copy that runs transformers' eager attention."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin


def documents(lengths=LENGTHS, *, seed=1, prompt_share=3):
    """(ids, labels) of random documents; the first third of each is not supervised."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for length in lengths:
        ids = torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
        result.append(document(ids, [i >= length // prompt_share for i in range(length)]))
    return result


def packed(docs):
    return batch_of(*docs)


def losses_alone(model, docs):
    """Sum of the token losses of documents that plain transformers sees one by one."""
    total = 0.0
    for ids, labels in docs:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        total = total + cross_entropy(
            logits.float(), torch.tensor(labels), ignore_index=IGNORED_LABEL, reduction="sum"
        )
    return total


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, reference, *, rtol=1e-5, floor=1e-2):
    """Norm-wise per tensor. One whose gradient is smaller than `floor` of the whole is held to that
    share instead: its own rounding noise comes from the larger ones."""
    assert ours.keys() == reference.keys()
    whole = torch.stack([g.double().norm() for g in reference.values()]).norm()
    for name, expected in reference.items():
        error = (ours[name].double() - expected.double()).norm()
        assert error <= rtol * max(expected.double().norm(), floor * whole), name


def tokenizer(size=VOCAB_SIZE, *, chat_template=None):
    """Words w3 … as tokens; </s> ends."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=chat_template,
    )
