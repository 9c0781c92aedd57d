"""The exported model is whole or the former one, and transformers reads it."""

import errno
import math

import pytest
import torch
from safetensors import SafetensorError

from fasttrain.checkpoint.huggingface import HuggingFaceCheckpoint
from fasttrain.config.schema.checkpoint import HuggingFaceCheckpointConfig
from fasttrain.core.checkpoint_interface import ResumableCheckpoint, UnfitToSave


class Tokenizer:
    def save_pretrained(self, directory):
        (directory / "tokenizer.json").write_text("{}")


class Writer:
    """What the language model does when it is asked to write itself."""

    def __init__(self, content="weights"):
        self.content = content
        self.dtypes = []

    def __call__(self, directory, *, dtype):
        self.dtypes.append(dtype)
        (directory / "config.json").write_text("{}")
        if isinstance(self.content, Exception):
            raise self.content
        (directory / "model.safetensors").write_text(self.content)


@pytest.fixture
def run(runs):
    run = runs()
    run.tokenizer = Tokenizer()
    run.model.save_pretrained = Writer()
    return run


def export(run, **options):
    return HuggingFaceCheckpoint(HuggingFaceCheckpointConfig(**options)).save(run)


def contents(directory):
    return {path.name: path.read_text() for path in directory.iterdir()}


def test_model_and_tokenizer_lie_together(run):
    path = export(run)
    assert path == run.directory / "model"
    assert contents(path) == {
        "config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "{}",
    }  # fmt: skip
    assert [entry.name for entry in run.directory.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("auto", None), ("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_the_dtype_is_passed_on(run, name, dtype):
    export(run, dtype=name)
    assert run.model.save_pretrained.dtypes == [dtype]


def test_a_new_export_replaces_the_old_one_whole(run):
    path = export(run)
    (path / "model-00002.safetensors").write_text("a shard of the former model")
    run.model.save_pretrained = Writer("new weights")
    assert export(run) == path
    assert contents(path)["model.safetensors"] == "new weights"
    assert "model-00002.safetensors" not in contents(path)
    assert [entry.name for entry in run.directory.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("failure", "number"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (SafetensorError("I/O error: No space left on device"), errno.EIO),
    ],
)
def test_a_failed_export_leaves_the_former_one(run, failure, number):
    path = export(run)
    before = contents(path)
    run.model.save_pretrained = Writer(failure)
    with pytest.raises(OSError) as caught:
        export(run)
    assert caught.value.errno == number
    assert contents(path) == before
    assert [entry.name for entry in run.directory.iterdir()] == ["model"]


def test_weights_that_are_not_finite_are_not_exported(run):
    path = export(run)
    with torch.no_grad():
        run.model.head.weight[0, 0] = math.nan
    run.model.save_pretrained = Writer("bad weights")
    with pytest.raises(UnfitToSave, match=r"head\.weight holds NaN or infinity"):
        export(run)
    assert contents(path)["model.safetensors"] == "weights"


def test_a_link_in_the_place_of_the_export_is_not_followed(run, tmp_path_factory):
    victim = tmp_path_factory.mktemp("victim")
    (run.directory / "model").symlink_to(victim)
    with pytest.raises(FileExistsError, match="symbolic link"):
        export(run)
    assert list(victim.iterdir()) == []


def test_an_export_is_not_resumed_from():
    assert not issubclass(HuggingFaceCheckpoint, ResumableCheckpoint)


def test_a_real_model_and_tokenizer_are_read_by_transformers(run):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    vocab = {letter: index for index, letter in enumerate("abcdefgh")}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="a"))
    run.tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    run.model.save_pretrained = lambda directory, *, dtype: model.save_pretrained(directory)
    path = export(run)
    read = transformers.AutoModelForCausalLM.from_pretrained(path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor)
    assert transformers.AutoTokenizer.from_pretrained(path)("c").input_ids == [2]
