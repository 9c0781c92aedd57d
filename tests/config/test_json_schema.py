"""The JSON Schema, the shipped configs, and the files generated from the schema."""

import importlib.util
import json
from pathlib import Path

import jsonschema
import pytest

from fasttrain.config.json_schema import config_schema
from fasttrain.config.load import load
from fasttrain.config.resolve import resolved_yaml
from fasttrain.config.tree import Origin, plain
from fasttrain.config.yaml_reader import parse

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


def values_of(text):
    return plain(parse(text, lambda line, column: Origin("file"), []))


@pytest.fixture(scope="module")
def validator():
    schema = config_schema()
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


@pytest.mark.parametrize(
    "text",
    [
        "model: org/x\ndata: a.jsonl\n",
        "extends: base.yaml\n",
        "extends: base.yaml\nmodel: {config: {a: 1}, transforms: [lora]}\ndata: {packing: false}\n",
        "model: {type: random, config: {a: 1}}\ntokenizer: trained\ndata: [python_stdlib, x]\n",
        "model: {name_or_path: x, transforms: [lora, {type: compile}]}\n"
        "data: {sources: [{path: a}]}\n",
        "model: x\ndata: y\nmax_steps: 1e3\nseed: 8k\noptimizer: {learning_rate: 3e-4}\n",
        "model: x\ndata: {sources: [y], eval_split: 5%}\nmax_steps: ${env:STEPS}\n",
        "model: x\ndata: y\noptimizer: 'my:Mine'\ncallbacks: [samples, {type: 'a.b:C', x: 1}]\n",
        "model: x\ndata: y\ntype: causal\ntrainer: {}\nscheduler: {warmup_ratio: 0.1}\n",
        "model: x\ndata: y\noptimizer: {betas: [0.9, 0.95]}\nmax_steps: null\n",
    ],
)
def test_what_loads_is_valid(validator, text):
    assert [error.message for error in validator.iter_errors(values_of(text))] == []


@pytest.mark.parametrize(
    "text",
    [
        "data: y\n",
        "model: x\ndata: y\nmax_stepss: 3\n",
        "model: x\ndata: y\nmax_steps: ten\n",
        "model: x\ndata: y\nmax_steps: 0\n",
        "model: x\ndata: y\nmax_steps: true\n",
        "model: x\ndata: y\noptimizer: {learning_rate: 0}\n",
        "model: x\ndata: y\noptimizer: {type: adamx}\n",
        "model: x\ndata: y\nscheduler: cosin\n",
        "model: x\ndata: y\ncallbacks: [tensor_board]\n",
        "model: x\ndata: y\ncallbacks: [{type: samples, num_promts: 1}]\n",
        "model: {name_or_path: x, transforms: [kernels]}\ndata: y\n",
        "model: x\ndata: {sources: [{path: a, splt: b}]}\n",
        "model: x\ndata: y\nprecision: fp8\n",
    ],
)
def test_what_does_not_load_is_not_valid(validator, text):
    assert list(validator.iter_errors(values_of(text)))


def test_a_resolved_config_is_valid(validator, config_of):
    text = resolved_yaml(config_of("callbacks: [samples, tensorboard]\n"))
    assert [error.message for error in validator.iter_errors(values_of(text))] == []


def test_every_key_has_its_help():
    schema = config_schema()
    sections = {"": schema, **schema["$defs"]}
    without = [
        f"{name}.{key}"
        for name, section in sections.items()
        for key, field in section.get("properties", {}).items()
        if "description" not in field and key != "type"
    ]
    assert without == []
    texts = [
        name for name, section in sections.items() if "." in name and "description" not in section
    ]
    assert texts == []


def test_registered_components_are_part_of_it(config_of, write):
    write(
        "my_code.py",
        "from fasttrain.config.registry import SCHEDULERS\n"
        "from fasttrain.config.schema.scheduler import SchedulerSection\n"
        "@SCHEDULERS.register('mine')\n"
        "class Mine:\n"
        "    class Config(SchedulerSection):\n"
        "        power: float = 2.0\n"
        "        '''Exponent.'''\n",
    )
    config_of("imports: [./my_code.py]\n")
    definition = config_schema()["$defs"]["scheduler.mine"]
    assert definition["properties"]["power"]["description"] == "Exponent."
    config_of()
    assert "scheduler.mine" not in config_schema()["$defs"]


# --- what is shipped -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_config(path, validator, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = path.read_text()
    first, *rest = text.splitlines()
    assert first == "# yaml-language-server: $schema=schema.json"
    header = [line for line in rest[: rest.index("")] if line.startswith("# ")]
    assert any(f"fasttrain run configs/{path.name}" in line for line in header)
    assert [error.message for error in validator.iter_errors(values_of(text))] == []
    # A recipe may name data that its launch command replaces.
    assert load(f"configs/{path.name}", ["data.sources=[python_stdlib]"]).name == path.stem


def test_configs_are_shipped():
    assert "quickstart.yaml" in [path.name for path in SHIPPED]


def test_the_schema_beside_them_is_json():
    assert json.loads((ROOT / "configs/schema.json").read_text())["title"] == "fasttrain"


def test_generated_files_are_not_stale():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs/generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    stale = generate.stale_files()
    assert stale == [], f"run python docs/generate.py: {stale}"
