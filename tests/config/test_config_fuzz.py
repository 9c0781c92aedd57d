"""Whatever stands at whatever key: a config loads, or every problem is the user's, on one line."""

import copy

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fasttrain.config.errors import UserError
from fasttrain.config.load import load
from fasttrain.config.resolve import plain_config

FULL = {
    "type": "sft",
    "model": {
        "name_or_path": "org/x",
        "transforms": [{"type": "lora", "r": 4}, "activation_checkpoint"],
    },
    "tokenizer": {"name_or_path": "org/y", "chat_template": "chatml"},
    "data": {
        "sources": [{"path": "a.jsonl", "columns": {"prompt": "q"}}, "org/z"],
        "eval_sources": ["org/held-out"],
        "max_length": 512,
    },
    "optimizer": {"type": "adamw", "learning_rate": 1e-4},
    "scheduler": {"type": "wsd", "warmup_ratio": 0.1},
    "checkpoint": [{"type": "sharded", "every_steps": 10}],
    "callbacks": ["samples", {"type": "early_stopping", "patience": 2}],
    "eval": {"every_steps": 5},
    "global_batch_size": 8,
    "micro_batch_size": 4,
    "imports": ["json"],
    "extends": None,
}
JUNK = [None, True, -1, 0, 10**40, 1e400, "", "x", "8k", "0", "a:B", "${env:NONE}", "../..", "\n"]
JUNK += [[], {}, [[]], [None], [3], {"a": 1}, {"type": None}, {"type": "x"}, {"type": []}, [{}]]

FAST = settings(
    max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


def paths(tree, path=()):
    """Every key path of the tree."""
    if path:
        yield path
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, part in parts if isinstance(tree, (dict, list)) else ():
        if isinstance(part, (dict, list)):
            yield from paths(part, (*path, key))
        else:
            yield (*path, key)


def changed(path, value):
    tree = copy.deepcopy(FULL)
    node = tree
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    return tree


def loads_or_explains(source, overrides=()):
    try:
        config = load(source, overrides).config
    except UserError as error:
        assert error.problems
        for problem in error.problems:
            assert "\n" not in str(problem)
            assert problem.what.endswith(".")
    else:
        plain_config(config)


@pytest.fixture(autouse=True)
def data(write):
    write("a.jsonl", '{"q": "a"}\n')


def test_the_config_itself_loads(workspace):
    load(FULL)


@pytest.mark.parametrize("path", list(paths(FULL)), ids=str)
def test_junk_at_every_key(path):
    for value in JUNK:
        loads_or_explains(changed(path, value))


def test_junk_on_the_command_line(write):
    file = write("sft.yaml", yaml.safe_dump(FULL))
    for path in paths(FULL):
        key = ".".join(map(str, path))
        for value in ("", "3", "[a", "{type: x}", "${env:NONE}"):
            loads_or_explains(file, [f"{key}={value}", f"{key}.deeper.0={value}"])


@FAST
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60))
def test_any_text_is_a_config_or_a_mistake(write, text):
    loads_or_explains(write("sft.yaml", text))


@FAST
@given(st.binary(max_size=40))
def test_any_bytes_are_a_config_or_a_mistake(write, data):
    loads_or_explains(write("sft.yaml", data))
