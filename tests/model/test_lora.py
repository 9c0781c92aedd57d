"""Adapters: where they go, what trains, and that peft reads what was written."""

import json
import sys

import pytest
import torch
from model.tiny_models import causal_lm, documents, gradients, packed, tokenizer
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fasttrain.config.errors import UserError
from fasttrain.config.schema.model import HuggingFaceModelConfig, LoraConfig, RandomModelConfig
from fasttrain.core.kernel_plan import KernelPlan
from fasttrain.model.hf import HuggingFaceModelFactory, as_language_model
from fasttrain.model.transforms.lora import LoraTransform
from fasttrain.runtime.precision import choose_precision

CPU = torch.device("cpu")
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A saved model to put adapters beside."""
    directory = tmp_path_factory.mktemp("base")
    causal_lm("llama").save_pretrained(directory)
    return directory


def load(base, precision="fp32"):
    factory = HuggingFaceModelFactory(HuggingFaceModelConfig(name_or_path=str(base)))
    precision = choose_precision(precision, CPU)
    return factory.build(tokenizer=tokenizer(), precision=precision, device=CPU)


def apply(model, **options):
    return LoraTransform(LoraConfig(**options)).apply(model, plan=KernelPlan())


def trained(model):
    """Adapters that do something: B begins as zeros."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def with_adapter(model):
    return {
        name.split(".lora_A")[0].split(".")[-1]
        for name, _ in model.named_parameters()
        if "lora_A" in name
    }


def test_every_linear_layer_but_the_head(base):
    model = apply(load(base), r=4, alpha=8.0)
    assert with_adapter(model) == PROJECTIONS
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trainable)
    assert len(trainable) == 2 * 2 * len(PROJECTIONS)
    assert "lora r=4 alpha=8 on 14 layers" in model.describe()


def test_fresh_adapters_change_nothing_and_get_gradients(base):
    plain, model = load(base), apply(load(base), r=2)
    batch = packed(documents())
    loss = model.token_losses(batch)
    torch.testing.assert_close(loss, plain.token_losses(batch), rtol=1e-6, atol=0)
    loss.backward()
    assert all("lora_" in name for name in gradients(model))
    moved = [g for name, g in gradients(model).items() if "lora_B" in name]
    assert len(moved) == 2 * len(PROJECTIONS)
    assert all(g.any() for g in moved)


def test_chosen_modules(base):
    assert with_adapter(apply(load(base), target_modules=("q_proj", "v_proj"))) == {
        "q_proj",
        "v_proj",
    }


def test_bf16_weights_train_fp32_adapters(base):
    model = apply(load(base, "bf16"), r=2)
    dtypes = {("lora_" in name, p.dtype) for name, p in model.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    model.token_losses(packed(documents())).backward()


# --- on disk ------------------------------------------------------------------------------------


def test_peft_reads_what_was_written(base, tmp_path):
    model = trained(apply(load(base), r=4))
    model.save_pretrained(tmp_path, dtype=None)
    assert {path.name for path in tmp_path.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert not (tmp_path / "model.safetensors").exists()
    plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    again = PeftModel.from_pretrained(plain, tmp_path)
    [(ids, _)] = docs = documents([11])
    expected = again(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(model.logits(packed(docs)), expected, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base.resolve())


def test_training_goes_on_from_saved_adapters(base, tmp_path):
    model = trained(apply(load(base), r=4, alpha=3.0))
    model.save_pretrained(tmp_path, dtype=None)
    again = apply(load(base), adapter_path=str(tmp_path))
    batch = packed(documents())
    assert torch.equal(again.token_losses(batch), model.token_losses(batch))
    trainable = {name for name, p in again.named_parameters() if p.requires_grad}
    assert trainable == {name for name, p in model.named_parameters() if p.requires_grad}


def test_another_dtype(base, tmp_path):
    model = trained(apply(load(base), r=4))
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    again = apply(load(base), adapter_path=str(tmp_path))
    ours = dict(model.named_parameters())
    for name, parameter in again.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, ours[name].bfloat16().float())


# --- mistakes -----------------------------------------------------------------------------------


def test_a_misspelt_module_among_good_ones(base):
    """peft takes the good ones and says nothing."""
    with pytest.raises(UserError) as error:
        apply(load(base), target_modules=("q_proj", "v_prj", "nothing_like_it"))
    first, second = map(str, error.value.problems)
    assert "target_modules: no module is called 'v_prj'. Did you mean 'v_proj'?" in first
    assert "There are: " in second


def test_all_linear_and_others(base):
    with pytest.raises(UserError, match="names all-linear and others"):
        apply(load(base), target_modules=("all-linear", "q_proj"))


def test_a_module_that_cannot_carry_one(base):
    with pytest.raises(UserError, match="peft can't put adapters there"):
        apply(load(base), target_modules=("input_layernorm",))


def test_random_weights(base):
    model = as_language_model(causal_lm(), RandomModelConfig())
    with pytest.raises(UserError, match="the model has random weights, which nothing saves"):
        apply(model)


def test_without_peft(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="lora needs peft"):
        apply(load(base))


def saved_adapters(base, directory):
    adapted = apply(load(base), r=4, target_modules=("q_proj", "v_proj", "up_proj"))
    adapted.save_pretrained(directory, dtype=None)


def test_an_adapter_path_that_holds_none(base, tmp_path):
    with pytest.raises(UserError, match=r"no adapter_config\.json is there"):
        apply(load(base), adapter_path=str(tmp_path / "nowhere"))


def test_adapters_in_a_pickle(base, tmp_path):
    saved_adapters(base, tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="other formats run code when they are read"):
        apply(load(base), adapter_path=str(tmp_path))


def test_adapters_of_another_kind(base, tmp_path):
    saved_adapters(base, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "IA3"}))
    with pytest.raises(UserError, match="the adapters are IA3, not LORA"):
        apply(load(base), adapter_path=str(tmp_path))


def test_adapters_of_another_rank_than_asked_for(base, tmp_path):
    saved_adapters(base, tmp_path)
    with pytest.raises(UserError, match=r"lora\.r: the adapters in .* were made with 4"):
        apply(load(base), adapter_path=str(tmp_path), r=8)


def test_adapters_of_another_model(base, tmp_path):
    saved_adapters(base, tmp_path)
    wide = tmp_path / "wide"
    causal_lm("llama", hidden_size=64).save_pretrained(wide)
    with pytest.raises(UserError, match="the adapters don't fit the model"):
        apply(load(wide), adapter_path=str(tmp_path))
    deep = tmp_path / "deep"
    causal_lm("llama", num_hidden_layers=3).save_pretrained(deep)
    with pytest.raises(UserError, match=r"the adapters lack .* and 1 more"):
        apply(load(deep), adapter_path=str(tmp_path))
    flat = tmp_path / "flat"
    causal_lm("llama", num_hidden_layers=1).save_pretrained(flat)
    with pytest.raises(UserError, match="the adapters have more than the model"):
        apply(load(flat), adapter_path=str(tmp_path))
