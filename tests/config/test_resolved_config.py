"""The resolved config: origins, reading it again, and what may differ between two starts."""

import pytest

from fasttrain.config.load import load
from fasttrain.config.resolve import FREE_TO_CHANGE, differing_keys, resolved_yaml

RICH = """\
lr: 3e-4
optimizer: {betas: [0.9, 0.95]}
callbacks:
  - type: samples
    prompts: ["a: b", 'it''s', "# no comment", "- x", "null", "1e5", "é\\n\\ttab", "  spaced  ", ""]
  - early_stopping
eval: {every_steps: 10}
seed: ${env:SEED:-9}
scheduler: {type: wsd, warmup_ratio: 5%}
"""
BASE = """\
model:
  type: random
  config: {hidden_size: 64, rope_scaling: {type: linear, factor: 2.0}, kinds: [a, b], x: [], y: {}}
tokenizer: {type: trained, chat_template: "{% for m in messages %}{{ m.content }}\\n{% endfor %}"}
data: {sources: [python_stdlib], eval_split: 5%}
"""


@pytest.fixture
def rich(config_of):
    return lambda *overrides, **options: config_of(RICH, overrides, base=BASE, **options)


def test_the_resolved_config_loads_to_the_same(rich, write):
    loaded = rich("max_steps=1k", "data.sources.0.max_samples=5")
    again = load(write("config.resolved.yaml", resolved_yaml(loaded)))
    assert again.config == loaded.config
    assert [c.type for c in again.config.callbacks] == ["samples", "early_stopping"]
    assert again.config.callbacks[0].prompts[6] == "é\n\ttab"
    third = load(write("third.yaml", resolved_yaml(again)))
    assert third.config == loaded.config


def test_every_value_carries_its_origin(rich):
    lines = resolved_yaml(rich("max_steps=1k", environ={"SEED": "4"})).splitlines()
    for line in (
        "type: sft  # default",
        "  type: sft  # derived: the top-level type",
        "  learning_rate: 0.0003  # sft.yaml:6",
        "    - 0.95  # sft.yaml:7",
        "    - type: python_stdlib  # derived: a registered source",
        "  eps: 1e-08  # default",
        "max_steps: 1000  # command line",
        "seed: 4  # env SEED (sft.yaml:13)",
        "  - type: sharded  # default",
        "      type: linear  # sft.yaml:3",
        "    y: {}  # sft.yaml:3",
        "output_dir: null  # default",
    ):
        assert line in lines
    assert all("  # " in line or line.endswith(":") for line in lines)


def test_origins_in_python(workspace):
    loaded = load({"model": {"type": "random"}, "tokenizer": "trained", "data": "org/x"})
    assert "  type: random  # python" in resolved_yaml(loaded).splitlines()


def test_a_secret_is_written_as_its_variable(config_of, write):
    environ = {"HUB_TOKEN": "s3cret"}
    loaded = config_of("output_dir: runs/${env:HUB_TOKEN}\n", environ=environ)
    text = resolved_yaml(loaded)
    assert "s3cret" not in text
    assert 'output_dir: "runs/${env:HUB_TOKEN}"  # env HUB_TOKEN (sft.yaml:4)' in text.splitlines()
    again = load(write("again.yaml", text), environ=environ)
    assert again.config == loaded.config


def test_imported_files_are_found_from_anywhere(config_of, write):
    write("my_code.py", "x = 1\n")
    loaded = config_of("imports: [./my_code.py]\n")
    again = load(write("runs/a/config.resolved.yaml", resolved_yaml(loaded)))
    assert again.config == loaded.config


# --- what may differ -----------------------------------------------------------------------------


def test_keys_that_differ_are_listed_with_both_values(rich):
    before = resolved_yaml(rich())
    now = resolved_yaml(rich("seed=5", "optimizer.betas=[0.9, 0.99]", "data.max_length=1k"))
    assert [str(difference) for difference in differing_keys(before, now)] == [
        "data.max_length: null → 1000",
        "optimizer.betas[1]: 0.95 → 0.99",
        "seed: 9 → 5",
    ]
    assert differing_keys(before, before) == ()


def test_what_does_not_change_training_may_differ(rich, write):
    write("my_code.py", "")
    (write("elsewhere/x", ""))
    changes = {
        "checkpoint": "checkpoint=[{type: sharded, every_steps: 3}]",
        "data.cache_dir": "data.cache_dir=cache",
        "data.num_workers": "data.num_workers=2",
        "engine": "engine.device=cpu",
        "eval": "eval.every_steps=3",
        "imports": "imports=[./my_code.py]",
        "kernels": "kernels=eager",
        "kill_file": "kill_file=elsewhere/STOP",
        "logging": "logging.every_steps=1",
        "output_dir": "output_dir=runs/other",
        "resume": "resume=never",
        "stop_after": "stop_after=3",
    }
    assert tuple(changes) == FREE_TO_CHANGE
    before = resolved_yaml(rich())
    for change in changes.values():
        now = resolved_yaml(rich(change))
        assert now != before
        assert differing_keys(before, now) == ()


def test_callbacks_that_only_look_may_differ(config_of):
    base = BASE
    before = resolved_yaml(config_of("callbacks: [early_stopping]\n", base=base))
    more = "callbacks: [console, samples, tensorboard, early_stopping]\n"
    assert differing_keys(before, resolved_yaml(config_of(more, base=base))) == ()
    (gone,) = differing_keys(before, resolved_yaml(config_of("", base=base)))[-1:]
    assert gone.key.startswith("callbacks")


def test_a_config_of_another_version_can_still_be_compared(rich):
    now = resolved_yaml(rich())
    before = now.replace("seed:", "sead:")
    assert [str(difference) for difference in differing_keys(before, now)] == [
        "seed: (absent) → 9",
        "sead: 9 → (absent)",
    ]
