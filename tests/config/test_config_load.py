"""Overrides, extends, environment values, short forms: how a config comes together."""

from pathlib import Path

import pytest

from fasttrain.config.load import load
from fasttrain.config.schema.data import (
    FileSourceConfig,
    HuggingFaceSourceConfig,
    PythonStdlibSourceConfig,
)
from fasttrain.config.schema.model import HuggingFaceModelConfig, LoraConfig, RandomModelConfig
from fasttrain.config.schema.optimizer import AdamWConfig
from fasttrain.config.schema.root import DEFAULT_CHECKPOINTS

BASE = {"model": {"type": "random"}, "tokenizer": "trained"}
BASE["data"] = {"sources": ["python_stdlib"], "eval_split": "5%"}


def test_the_least_config_has_every_default(config_of):
    config = config_of().config
    assert config.type == config.trainer.type == "sft"
    assert isinstance(config.model, RandomModelConfig)
    assert isinstance(config.data.sources[0], PythonStdlibSourceConfig)
    assert config.optimizer == AdamWConfig()
    assert config.scheduler.type == "cosine"
    assert config.engine.type == "auto"
    assert config.checkpoint == DEFAULT_CHECKPOINTS
    assert config.output_dir is None


def test_a_config_cannot_be_changed(config_of):
    with pytest.raises(ValueError, match="frozen"):
        config_of().config.seed = 3


def test_a_mapping_loads_as_a_file_does(config_of):
    assert load(BASE).config == config_of().config


def test_the_name_is_that_of_the_file(write):
    import json

    assert load(write("recipes/chat.v2.yaml", json.dumps(BASE))).name == "chat.v2"
    assert load(BASE).name == "run"


# --- short forms ---------------------------------------------------------------------------------


def test_sections_may_be_one_value(config_of):
    base = "model: org/name\ndata: python_stdlib\noptimizer: adamw\nscheduler: wsd\nengine: local\n"
    config = config_of("kernels: eager\ntokenizer: org/other\n", base=base).config
    assert config.model.name_or_path == "org/name"
    assert config.scheduler.type == "wsd"
    assert config.engine.type == "local"
    assert config.kernels.mode == "eager"
    assert (config.tokenizer.type, config.tokenizer.name_or_path) == ("huggingface", "org/other")


def test_an_empty_section_is_its_default(config_of):
    text = "optimizer:\neval:\nlogging:\ncallbacks:\nkernels:\n"
    assert config_of(text).config == config_of().config


def test_component_lists_take_names(config_of):
    text = "callbacks: [samples]\ncheckpoint: huggingface\n"
    config = config_of(text, ["model.transforms=[lora, compile]"]).config
    assert [c.type for c in config.callbacks] == ["samples"]
    assert [c.type for c in config.checkpoint] == ["huggingface"]
    assert config.model.transforms[0] == LoraConfig()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("rows.jsonl", FileSourceConfig),
        ("folder", FileSourceConfig),
        ("folder/*.jsonl", FileSourceConfig),
        ("saved", HuggingFaceSourceConfig),
        ("org/dataset", HuggingFaceSourceConfig),
        ("some_dataset", HuggingFaceSourceConfig),
        ("python_stdlib", PythonStdlibSourceConfig),
    ],
)
def test_text_among_the_sources_is_understood(config_of, write, text, kind):
    write("rows.jsonl", '{"text": "a"}\n')
    write("folder/more.jsonl", '{"text": "b"}\n')
    write("saved/state.json", "{}")
    sources = config_of("", [f"data.sources=['{text}']"]).config.data.sources
    assert [type(source) for source in sources] == [kind]
    assert text in (getattr(sources[0], "path", ""), getattr(sources[0], "name_or_path", text))


def test_a_source_needs_no_type_where_its_key_says_it(config_of, write):
    write("rows.jsonl", '{"text": "a"}\n')
    text = "[{path: rows.jsonl, max_samples: 1k}, {name_or_path: org/x, split: test}]"
    first, second = config_of("", [f"data.sources={text}"]).config.data.sources
    assert (first.type, first.max_samples) == ("file", 1000)
    assert (second.type, second.split) == ("huggingface", "test")


def test_the_home_directory_is_known(config_of, monkeypatch, workspace):
    monkeypatch.setenv("HOME", str(workspace))
    assert config_of("output_dir: ~/runs/a\n").config.output_dir == f"{workspace}/runs/a"


def test_the_method_names_its_options(config_of):
    config = config_of("type: causal\ntrainer: {}\n").config
    assert config.trainer.type == "causal"


# --- overrides -----------------------------------------------------------------------------------


def test_overrides_are_yaml_typed_by_the_schema(config_of):
    overrides = [
        "optimizer.learning_rate=3e-4",
        "data.max_length=8k",
        "data.packing=false",
        "max_steps=1e3",
        "precision=fp32",
        "eval.every_steps=null",
        "optimizer.betas=[0.9, 0.95]",
    ]
    config = config_of("", overrides).config
    assert config.optimizer.learning_rate == 3e-4
    assert config.optimizer.betas == (0.9, 0.95)
    assert (config.data.max_length, config.max_steps) == (8000, 1000)
    assert config.data.packing is False


@pytest.mark.parametrize("value", ["1234", "1e10", "true", "null", "007", "8k"])
def test_where_text_is_wanted_an_override_is_text(config_of, value):
    base = "model: org/name\ndata: [python_stdlib]\n"
    found = config_of("", [f"model.revision={value}"], base=base).config.model.revision
    assert found == (None if value == "null" else value)


def test_an_override_replaces_what_stands_there(config_of):
    text = "callbacks: [{type: samples, num_prompts: 5}]\n"
    config = config_of(text, ["callbacks=[early_stopping]", "data.eval_split=5%"]).config
    assert [c.type for c in config.callbacks] == ["early_stopping"]
    new_model = "model={name_or_path: org/name}"
    assert isinstance(config_of("", [new_model]).config.model, HuggingFaceModelConfig)
    assert isinstance(config_of("", ["model=org/name"]).config.model, HuggingFaceModelConfig)


def test_an_override_reaches_into_a_list(config_of):
    text = "callbacks: [samples]\n"
    for key in ("callbacks.0.num_prompts", "callbacks[0].num_prompts"):
        assert config_of(text, [f"{key}=7"]).config.callbacks[0].num_prompts == 7
    for key in ("callbacks[samples].num_prompts", "callbacks.0.num_prompts"):
        assert config_of(text, [f"{key}=7"]).config.callbacks[0].num_prompts == 7


def test_the_default_checkpoints_can_be_reached_into(config_of):
    config = config_of("", ["checkpoint.0.every_steps=5", "checkpoint[huggingface].dtype=bf16"])
    sharded, huggingface = config.config.checkpoint
    assert (sharded.type, sharded.every_steps) == ("sharded", 5)
    assert (huggingface.type, huggingface.dtype) == ("huggingface", "bf16")


def test_later_overrides_win(config_of):
    assert config_of("", ["seed=1", "seed=2"]).config.seed == 2


def test_overrides_from_python(config_of):
    overrides = {"optimizer.learning_rate": 1e-3, "output_dir": Path("runs/x"), "seed": "1k"}
    config = config_of("", overrides).config
    assert (config.optimizer.learning_rate, config.seed) == (1e-3, 1000)
    assert config.output_dir == "runs/x"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "command line: not an override (got 'seed', expected key.path=value)."),
        ("=3", "command line: not an override (got '=3', expected key.path=value)."),
        ("a..b=3", "command line: not an override (got 'a..b=3', expected key.path=value)."),
        (
            "seed.x=3",
            "command line: seed.x: seed is a single value, which has no 'x'.",
        ),
        (
            "callbacks.3=samples",
            "command line: callbacks.3: callbacks is a list of 1, which has no '3'.",
        ),
        (
            "callbacks.first=samples",
            "command line: callbacks.first: callbacks is a list of 1, which has no 'first'.",
        ),
        (
            "data.sources=[a.jsonl",
            "command line: data.sources: not valid YAML: expected ',' or ']', but got "
            "'<stream end>' (column 9). Quote text that holds ': ', '{', '[' or '#'.",
        ),
        (
            "max_steps=ten",
            "command line: max_steps: not a whole number (got 'ten', expected a "
            "whole number such as 100 or 8k).",
        ),
        (
            "data.max_lenth=3",
            "command line: data.max_lenth: unknown key. Did you mean 'max_length'?",
        ),
    ],
)
def test_overrides_that_cannot_be(problems_of, override, message):
    assert problems_of("seed: 1\ncallbacks: [samples]\n", [override]) == [message]


# --- extends -------------------------------------------------------------------------------------


def test_extends_merges_mappings_and_replaces_the_rest(config_of, write):
    write(
        "base/common.yaml",
        "optimizer: {learning_rate: 1e-3, weight_decay: 0.1}\ncallbacks: [samples]\nseed: 1\n"
        "scheduler: {type: wsd, decay_ratio: 0.2}\n",
    )
    text = (
        "extends: base/common.yaml\noptimizer: {weight_decay: 0}\ncallbacks: []\n"
        "scheduler: {type: cosine}\n"
    )
    config = config_of(text).config
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (1e-3, 0.0)
    assert config.callbacks == ()
    assert config.seed == 1
    assert config.scheduler.type == "cosine"


def test_a_section_of_another_type_is_replaced_as_a_whole(write):
    write("base.yaml", "model: {type: random, config: {hidden_size: 8}}\ntokenizer: trained\n")
    write(
        "explicit.yaml",
        "extends: base.yaml\nmodel: {type: huggingface, name_or_path: org/x}\n"
        "data: python_stdlib\n",
    )
    assert load("explicit.yaml").config.model == HuggingFaceModelConfig(name_or_path="org/x")
    write("back.yaml", "extends: explicit.yaml\nmodel: {type: random}\n")
    assert load("back.yaml").config.model == RandomModelConfig()


def test_extends_is_relative_to_its_file_and_chains(write):
    write("a/b/low.yaml", "seed: 1\nmax_steps: 5\ndata: python_stdlib\n")
    write("a/middle.yaml", "extends: b/low.yaml\nseed: 2\nmodel: {type: random}\n")
    write("top.yaml", "extends: a/middle.yaml\ntokenizer: trained\n")
    loaded = load("top.yaml")
    assert (loaded.config.seed, loaded.config.max_steps) == (2, 5)
    assert str(loaded.origins["seed"]) == "a/middle.yaml:2"
    assert str(loaded.origins["max_steps"]) == "a/b/low.yaml:2"


def test_a_circle_of_files_is_printed(write, problems_of):
    write("b.yaml", "extends: c.yaml\n")
    write("c.yaml", "extends: sft.yaml\n")
    assert problems_of("extends: b.yaml\n") == [
        "c.yaml:1: extends: a circle: sft.yaml → b.yaml → c.yaml → sft.yaml."
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "absent.yaml",
            "sft.yaml:4: extends: no such file (got 'absent.yaml'). "
            "The path is relative to the file that names it.",
        ),
        (
            ".",
            "sft.yaml:4: extends: not a file (got '.'). "
            "The path is relative to the file that names it.",
        ),
        ("[a.yaml]", "sft.yaml:4: extends: not a path (expected one YAML file)."),
    ],
)
def test_a_base_that_is_not_there(problems_of, value, message):
    assert problems_of(f"extends: {value}\n") == [message]


def test_a_problem_in_the_base_names_the_base(write, problems_of):
    write("base.yaml", "seed: 1\nmax_stepss: 3\n")
    assert problems_of("extends: base.yaml\nepoch: 3\n") == [
        "base.yaml:2: max_stepss: unknown key. Did you mean 'max_steps'?",
        "sft.yaml:5: epoch: unknown key. Did you mean 'epochs'?",
    ]


# --- environment ---------------------------------------------------------------------------------


def test_environment_values_are_typed_by_the_schema(config_of):
    text = (
        "max_steps: ${env:STEPS}\noutput_dir: runs/${env:NAME}-${env:STEPS}\n"
        'seed: "${env:SEED:-1k}"\noverfit_first_batch: ${env:OVERFIT}\n'
        "resume: ${env:RESUME:-never}\n"
    )
    environ = {"STEPS": "12", "NAME": "x", "OVERFIT": "true"}
    loaded = config_of(text, environ=environ)
    config = loaded.config
    assert (config.max_steps, config.output_dir, config.seed) == (12, "runs/x-12", 1000)
    assert config.overfit_first_batch is True
    assert config.resume == "never"
    assert str(loaded.origins["max_steps"]) == "env STEPS (sft.yaml:4)"
    assert str(loaded.origins["output_dir"]) == "env NAME, STEPS (sft.yaml:5)"
    assert str(loaded.origins["seed"]) == "sft.yaml:6"


def test_an_environment_value_may_be_text_that_looks_like_a_number(config_of):
    base = "model: {name_or_path: org/x, revision: '${env:REV}'}\ndata: [python_stdlib]\n"
    assert config_of("", base=base, environ={"REV": "1e10"}).config.model.revision == "1e10"


def test_an_override_reads_the_environment(config_of):
    loaded = config_of("", ["seed=${env:SEED}"], environ={"SEED": "7"})
    assert loaded.config.seed == 7
    assert str(loaded.origins["seed"]) == "env SEED (command line)"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "${env:UNSET}",
            "sft.yaml:4: output_dir: the environment variable UNSET is not set. "
            "Set it, or write ${env:UNSET:-default}.",
        ),
        (
            "${HOME}/x",
            "sft.yaml:4: output_dir: unreadable (got '${HOME}', expected ${env:NAME} or "
            "${env:NAME:-default}). Write ${env:HOME}.",
        ),
        (
            "${env:}",
            "sft.yaml:4: output_dir: unreadable (got '${env:}', expected ${env:NAME} or "
            "${env:NAME:-default}).",
        ),
    ],
)
def test_environment_values_that_cannot_be_read(problems_of, value, message):
    assert problems_of(f"output_dir: {value}\n", environ={}) == [message]


def test_a_variable_that_is_not_set_is_one_problem(problems_of):
    lines = problems_of("seed: ${env:UNSET}\nprecision: ${env:UNSET}\n", environ={})
    assert [line.split(": ")[1] for line in lines] == ["seed", "precision"]


def test_a_secret_is_never_shown(problems_of, config_of):
    environ = {"MY_API_KEY": "s3cret"}
    assert problems_of("seed: ${env:MY_API_KEY}\n", environ=environ) == [
        "sft.yaml:4: seed: not a whole number (got ${env:MY_API_KEY}, expected a whole number "
        "such as 100 or 8k)."
    ]
    loaded = config_of("output_dir: runs/${env:MY_API_KEY}\n", environ=environ)
    assert loaded.config.output_dir == "runs/s3cret"
    assert loaded.masked == {"output_dir": "runs/${env:MY_API_KEY}"}
