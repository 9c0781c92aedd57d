"""The names other trainers use: read as ours, and said aloud."""

import pytest

from fasttrain.config.aliases import ALIASES, CONVERTED, RENAMED
from fasttrain.config.load import load
from fasttrain.config.schema.model import (
    ActivationCheckpointConfig,
    CompileConfig,
    LoraConfig,
)

TRL = """\
model_name_or_path: Qwen/Qwen3-0.6B
dataset_name: trl-lib/Capybara
learning_rate: 2.0e-5
num_train_epochs: 1
packing: true
max_length: 2048
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
gradient_checkpointing: true
bf16: true
lr_scheduler_type: cosine
warmup_ratio: 0.03
logging_steps: 25
save_steps: 100
save_total_limit: 3
use_peft: true
lora_r: 32
lora_alpha: 16
report_to: none
output_dir: out/trl
seed: 7
"""

AXOLOTL = """\
base_model: NousResearch/Llama-3.2-1B
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
  - {path: org/chats, type: chat_template, split: 'train[:10%]', name: en}
val_set_size: 0.1
output_dir: ./outputs/lora-out
adapter: lora
sequence_len: 2048
sample_packing: true
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_modules: [gate_proj, up_proj]
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_torch_fused
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
train_on_inputs: false
gradient_checkpointing: true
resume_from_checkpoint:
logging_steps: 1
weight_decay: 0.0
"""

LLAMA_FACTORY = """\
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: sft
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity.jsonl,alpaca_en_demo
cutoff_len: 2k
max_samples: 1000
preprocessing_num_workers: 4
per_device_train_batch_size: 1
num_train_epochs: 3.0
lr_scheduler_type: constant_with_warmup
warmup_ratio: 0.1
val_size: 0.1
eval_steps: 500
"""


def test_a_trl_config(write):
    loaded = load(write("trl.yaml", TRL))
    config = loaded.config
    assert config.model.name_or_path == "Qwen/Qwen3-0.6B"
    assert config.data.sources[0].name_or_path == "trl-lib/Capybara"
    assert (config.data.max_length, config.data.packing) == (2048, True)
    assert config.optimizer.learning_rate == 2e-5
    assert (config.epochs, config.micro_batch_size) == (1.0, 2)
    assert config.precision == "bf16-mixed"
    assert (config.scheduler.type, config.scheduler.warmup_ratio) == ("cosine", 0.03)
    assert config.model.transforms == (LoraConfig(r=32, alpha=16.0), ActivationCheckpointConfig())
    sharded, huggingface = config.checkpoint
    assert (sharded.every_steps, sharded.keep) == (100, 3)
    assert huggingface.type == "huggingface"
    assert config.logging.every_steps == 25
    assert str(loaded.aliases_used[0]) == "read 'model_name_or_path' as 'model.name_or_path'"
    assert "read 'bf16' as 'precision: bf16-mixed'" in map(str, loaded.aliases_used)
    assert "read 'report_to' as the default" in map(str, loaded.aliases_used)


def test_an_axolotl_config(write):
    loaded = load(write("axolotl.yaml", AXOLOTL))
    config = loaded.config
    first, second = config.data.sources
    assert first.name_or_path == "teknium/GPT4-LLM-Cleaned"
    assert (second.split, second.config_name) == ("train[:10%]", "en")
    assert config.data.eval_split == 0.1
    lora, checkpointing = config.model.transforms
    assert lora.target_modules == ("gate_proj", "up_proj")
    assert checkpointing.type == "activation_checkpoint"
    assert config.optimizer.type == "adamw"
    assert config.precision == "auto"
    assert config.resume == "auto"
    written = "read 'optimizer.type: adamw_torch_fused' as 'optimizer.type: adamw'"
    assert written in map(str, loaded.aliases_used)


def test_a_llama_factory_config(write):
    write("identity.jsonl", '{"instruction": "a", "output": "b"}\n')
    config = load(write("lf.yaml", LLAMA_FACTORY)).config
    assert [source.type for source in config.data.sources] == ["file", "huggingface"]
    assert config.model.transforms[0].target_modules == ("all-linear",)
    assert (config.data.max_length, config.data.num_workers) == (2000, 4)
    assert config.scheduler.type == "constant"
    assert config.eval.every_steps == 500


@pytest.mark.parametrize("alias", sorted(RENAMED))
def test_every_renamed_key_exists(alias):
    """The target must be a key of the schema, or it would be reported under a name nobody wrote."""
    base = {"model": {"name_or_path": "org/x"}, "data": {"sources": ["org/y"]}}
    section, _, key = alias.rpartition(".")
    config = {**base, section: {**base.get(section, {}), key: None}} if section else None
    try:
        load(config or {**base, alias: None})
    except ValueError as error:
        assert "unknown key" not in str(error)


def test_converted_keys_are_no_renamed_ones():
    assert not set(CONVERTED) & set(RENAMED)
    assert len(ALIASES) == len(CONVERTED) + len(RENAMED)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "lr: 1e-3\noptimizer: {learning_rate: 1e-3}\n",
            "sft.yaml:4: lr: says the same as 'optimizer.learning_rate', which is given too. "
            "Keep one.",
        ),
        (
            "lr: 1e-3\nlearning_rate: 1e-3\n",
            "sft.yaml:4: lr: says the same as 'optimizer.learning_rate', which is given too. "
            "Keep one.",
        ),
        (
            "bf16: maybe\n",
            "sft.yaml:4: bf16: no counterpart (got 'maybe'). Use `precision`.",
        ),
        (
            "report_to: wandb\n",
            "sft.yaml:4: report_to: no counterpart (got 'wandb'). There is no tracker 'wandb'; "
            "name one under `callbacks`.",
        ),
        (
            "adapter: qlora\n",
            "sft.yaml:4: adapter: no counterpart (got 'qlora'). There is the transform `lora`, and "
            "full training without it.",
        ),
        (
            "fp16: true\n",
            "sft.yaml:4: fp16: not a key here. fp16 needs loss scaling, which is not offered. "
            "Use `precision: bf16-mixed`.",
        ),
        (
            "flash_attention: true\n",
            "sft.yaml:4: flash_attention: not a key here. Remove it: attention is chosen by "
            "`model.attention` and `kernels`.",
        ),
        (
            "num_epochs: many\n",
            "sft.yaml:4: epochs: not a number (got 'many', expected a number such as 2e-5).",
        ),
    ],
)
def test_aliases_that_cannot_be_read(problems_of, text, message):
    assert problems_of(text) == [message]


def test_an_alias_below_overrides_the_base_file(config_of, write):
    write("base.yaml", "optimizer: {learning_rate: 1e-3}\n")
    assert config_of("extends: base.yaml\nlr: 5e-4\n").config.optimizer.learning_rate == 5e-4


def test_aliases_on_the_command_line(config_of):
    loaded = config_of("lr: 1e-3\n", ["lr=2e-3", "lora_r=4", "gradient_checkpointing=true"])
    assert loaded.config.optimizer.learning_rate == 2e-3
    assert loaded.config.model.transforms == (LoraConfig(r=4), ActivationCheckpointConfig())
    uses = [(str(use), use.where) for use in loaded.aliases_used]
    assert uses[1] == ("read 'lr' as 'optimizer.learning_rate'", "command line")


def test_transforms_from_aliases_stand_in_the_fixed_order(config_of):
    transforms = config_of("torch_compile: true\ngradient_checkpointing: true\nlora_r: 4\n")
    assert transforms.config.model.transforms == (
        LoraConfig(r=4),
        ActivationCheckpointConfig(),
        CompileConfig(),
    )
