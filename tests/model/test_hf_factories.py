"""Models from directories, from the hub's name, and from random weights: what is loaded, and what
is refused before it is."""

import json
import shutil

import pytest
import torch
from model.tiny_models import VOCAB_SIZE, causal_lm, documents, packed, tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fasttrain.config.errors import UserError
from fasttrain.config.schema.model import HuggingFaceModelConfig, RandomModelConfig
from fasttrain.model import weights
from fasttrain.model.hf import HuggingFaceModelFactory, RandomModelFactory
from fasttrain.runtime.precision import choose_precision

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    causal_lm("llama").save_pretrained(directory)
    return directory


@pytest.fixture
def model_dir(saved, tmp_path):
    """A copy to break."""
    return shutil.copytree(saved, tmp_path / "model")


def build(directory, *, precision="fp32", words=None, **options):
    factory = HuggingFaceModelFactory(
        HuggingFaceModelConfig(name_or_path=str(directory), **options)
    )
    return factory.build(
        tokenizer=words or tokenizer(), precision=choose_precision(precision, CPU), device=CPU
    )


def refused(*args, **options):
    with pytest.raises(UserError) as error:
        build(*args, **options)
    return str(error.value)


# --- pretrained ---------------------------------------------------------------------------------


def test_a_directory(saved):
    model = build(saved)
    expected = load_file(saved / WEIGHTS)
    state = model.causal_lm.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert model.describe().startswith(f"{saved} · LlamaForCausalLM · 2 layers of width 32")
    factory = HuggingFaceModelFactory(HuggingFaceModelConfig(name_or_path=str(saved)))
    assert factory.max_length() == 64


def test_a_tied_head_need_not_be_stored(tmp_path):
    causal_lm("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    model = build(tmp_path)
    assert model.head.weight is model.causal_lm.get_input_embeddings().weight


def test_the_dtype_is_that_of_the_precision(saved, caplog):
    caplog.set_level("INFO", "fasttrain")
    assert build(saved, precision="bf16-mixed").causal_lm.dtype == torch.float32
    assert caplog.messages == []
    assert build(saved, precision="bf16").causal_lm.dtype == torch.bfloat16
    [message] = caplog.messages
    assert "stored in float32 and rounded to torch.bfloat16" in message


def test_values_of_the_config_can_be_replaced(saved):
    model = build(saved, config_overrides={"rms_norm_eps": 0.5, "attention_dropout": 0.1})
    assert model.causal_lm.model.norm.variance_epsilon == 0.5
    assert model.causal_lm.config.attention_dropout == 0.1
    text = refused(saved, config_overrides={"rms_norm_epz": 0.5})
    assert text.startswith("model.config_overrides.rms_norm_epz: ")
    assert "Did you mean 'rms_norm_eps'?" in text


def test_several_files(tmp_path):
    causal_lm("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    build(tmp_path)
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    victim.unlink()
    assert f"{victim.name}, which model.safetensors.index.json names, is missing" in refused(
        tmp_path
    )


def test_a_skeleton_has_shapes_and_no_weights(saved):
    section = HuggingFaceModelConfig(name_or_path=str(saved))
    model = HuggingFaceModelFactory(section).skeleton()
    real = build(saved)
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in real.named_parameters()
    }
    assert all(p.device.type == "meta" for p in model.parameters())
    assert "not checked: there are no weights" in model.describe()


# --- broken weights -----------------------------------------------------------------------------


def rewrite(directory, change):
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def test_a_missing_tensor(model_dir):
    """transformers fills it with random numbers and goes on."""
    rewrite(model_dir, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert AutoModelForCausalLM.from_pretrained(model_dir) is not None
    text = refused(model_dir)
    assert "the weights lack model.layers.1.mlp.up_proj.weight." in text
    assert "\n" not in text


def test_many_missing_tensors_are_counted(model_dir):
    def keep_two(tensors):
        for name in list(tensors)[2:]:
            del tensors[name]

    rewrite(model_dir, keep_two)
    assert " and " in refused(model_dir)
    assert "more." in refused(model_dir)


def test_a_tensor_of_another_shape(model_dir):
    path = model_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 40}))
    text = refused(model_dir)
    assert (
        "model.layers.0.mlp.down_proj.weight is (32, 48) in the weights and (32, 40) by the config"
        in text
    )


def test_tensors_without_a_place_are_mentioned(model_dir, caplog):
    caplog.set_level("INFO", "fasttrain")
    rewrite(model_dir, lambda tensors: tensors.update({"model.extra.weight": torch.ones(3)}))
    build(model_dir)
    assert caplog.messages == ["weights the model has no use for: model.extra.weight"]


def test_nan_in_the_weights(model_dir):
    rewrite(model_dir, lambda tensors: tensors["model.norm.weight"].__setitem__(3, float("nan")))
    assert "NaN or infinite numbers in model.norm.weight." in refused(model_dir)


def test_a_truncated_file(model_dir):
    path = model_dir / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    text = refused(model_dir)
    assert (
        f"{path}: model.name_or_path: the file is broken: it has {len(whole) - 100} bytes" in text
    )
    path.write_bytes(whole[:20])
    assert "its header should take" in refused(model_dir)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused(model_dir, name):
    (model_dir / WEIGHTS).rename(model_dir / name)
    text = refused(model_dir)
    assert f"{name} is a pickle, which runs code when it is read" in text
    assert "save_pretrained(NEW_DIR)" in text


def test_no_weights_at_all(model_dir):
    (model_dir / WEIGHTS).unlink()
    assert "there are no weights (*.safetensors) in it" in refused(model_dir)


def test_quantised_weights(model_dir):
    path = model_dir / "config.json"
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    path.write_text(json.dumps(json.loads(path.read_text()) | quantised))
    assert "its weights are quantised, and those can't be trained" in refused(model_dir)


# --- names --------------------------------------------------------------------------------------


def test_names_that_are_no_model(tmp_path, saved):
    assert "it is a file" in refused(saved / "config.json")
    assert "there is no such directory" in refused(tmp_path / "nowhere")
    assert "there is no such directory" in refused("./nowhere")
    assert "there is no config.json in it" in refused(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "it holds adapters, not a model" in refused(tmp_path)


def test_broken_config(model_dir):
    (model_dir / "config.json").write_text("{broken")
    assert "transformers can't load it" in refused(model_dir)


def test_a_hub_name_without_a_connection(monkeypatch):
    monkeypatch.setattr(weights, "hub_reachable", lambda: False)
    text = refused("nobody/nothing-of-the-kind")
    assert "the hub can't be reached" in text
    assert "\n" not in text


def test_code_that_comes_with_a_model_is_not_run(model_dir):
    path = model_dir / "config.json"
    code = {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | code))
    (model_dir / "own.py").write_text("raise SystemExit('ran')")
    text = refused(model_dir)
    assert "it brings Python code of its own" in text
    assert "model.trust_remote_code=true" in text


def test_a_tokenizer_with_more_tokens_than_the_model(saved):
    text = refused(saved, words=tokenizer(VOCAB_SIZE + 3))
    assert "its largest token id is 99 and the model embeds 97 tokens" in text
    build(saved, words=tokenizer(VOCAB_SIZE - 10))  # fewer are no harm


# --- random weights -----------------------------------------------------------------------------

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def random_model(architecture="llama", *, words=None, seed=0, attention="auto", **sizes):
    section = RandomModelConfig(
        architecture=architecture, config=SIZES | sizes, attention=attention
    )
    torch.manual_seed(seed)
    return RandomModelFactory(section).build(
        tokenizer=words or tokenizer(), precision=choose_precision("fp32", CPU), device=CPU
    )


def test_random_weights_take_vocabulary_and_special_tokens_from_the_tokenizer():
    model = random_model()
    config = model.causal_lm.config
    assert config.vocab_size == VOCAB_SIZE
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert model.describe().startswith("random weights · LlamaForCausalLM")
    assert random_model(vocab_size=128).causal_lm.config.vocab_size == 128
    assert model.token_losses(packed(documents())).isfinite()


def test_an_end_token_that_also_pads_is_learnt():
    """An embedding never learns its padding token."""
    words = tokenizer()
    words.pad_token = words.eos_token
    model = random_model(words=words)
    assert model.causal_lm.config.pad_token_id is None
    assert model.causal_lm.get_input_embeddings().padding_idx is None


def test_the_seed_decides_the_weights():
    first, same, other = random_model(), random_model(), random_model(seed=1)
    weight = "causal_lm.model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first.state_dict()[weight], same.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])


def test_max_length_and_skeleton_need_no_tokenizer():
    section = RandomModelConfig(config=SIZES | {"max_position_embeddings": 512})
    factory = RandomModelFactory(section)
    assert factory.max_length() == 512
    assert all(p.device.type == "meta" for p in factory.skeleton().parameters())
    assert RandomModelFactory(RandomModelConfig(architecture="mamba")).max_length() is None
    assert RandomModelFactory(RandomModelConfig(architecture="gpt2")).max_length() == 1024


@pytest.mark.parametrize(
    ("architecture", "sizes", "text"),
    [
        (
            "lama",
            {},
            "model.architecture: transformers has no causal language model of type 'lama'. "
            "Did you mean 'llama'?",
        ),
        (
            "llama",
            {"hiden_size": 3},
            "model.config.hiden_size: the config of llama has no such key. "
            "Did you mean 'hidden_size'?",
        ),
        ("llama", {"hidden_size": 30}, "is not a multiple of the number of attention heads"),
        ("llama", {"hidden_size": "big"}, "hidden_size"),
        ("llama", {"num_key_value_heads": 3}, "transformers can't make or run LlamaForCausalLM"),
        ("llama", {"vocab_size": 10}, "its largest token id is 96 and the model embeds 10 tokens"),
    ],
)
def test_impossible_architectures(architecture, sizes, text):
    with pytest.raises(UserError) as error:
        random_model(architecture, **sizes)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_every_unknown_size_is_named():
    with pytest.raises(UserError) as error:
        random_model(hiden_size=3, num_layer=2)
    assert len(error.value.problems) == 2
