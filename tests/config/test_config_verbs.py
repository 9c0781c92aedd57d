"""`fasttrain validate`, `show-config` and `schema`, as typed into a shell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GOOD = """\
model: {type: random}
tokenizer: trained
data: {sources: [a.jsonl], eval_split: 5%}
lr: 1e-3
global_batch_size: 8
"""


@pytest.fixture
def fasttrain(write):
    write("a.jsonl", '{"text": "a"}\n')
    write("sft.yaml", GOOD)

    def command(*arguments, python=("-m", "fasttrain")):
        path = f"{ROOT}:{ROOT / 'kernels'}"
        return subprocess.run(
            [sys.executable, *python, *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
            timeout=120,
        )

    return command


def test_validate_says_ok_and_what_follows(fasttrain):
    done = fasttrain("validate", "sft.yaml", "epochs=2")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "ok: sft.yaml",
        "  config     read 'lr' as 'optimizer.learning_rate' (sft.yaml:4)",
        "  method     sft",
        "  model      random",
        "  data       file: a.jsonl",
        "  held out   5% of the rows, by the run's seed",
        "  batch      8 packs per step, 1 at a time on each device",
        "  horizon    2 epochs",
        "  output     runs/sft (name of the config)",
    ]


def test_validate_prints_each_problem_once_and_leaves_with_2(fasttrain):
    done = fasttrain("validate", "sft.yaml", "max_steps=0", "data.sources=[b.jsonl]")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "fasttrain: error: command line: max_steps: out of range (got 0, expected at least 1).",
        "fasttrain: error: command line: data.sources[0].path: no such file (got 'b.jsonl'). "
        "Did you mean 'a.jsonl'?",
    ]


def test_show_config_prints_origins_and_reads_back(fasttrain, write):
    done = fasttrain("show-config", "sft.yaml", "seed=7")
    assert (done.returncode, done.stderr) == (0, "")
    assert "# read 'lr' as 'optimizer.learning_rate'" in done.stdout.splitlines()
    assert "  learning_rate: 0.001  # sft.yaml:4" in done.stdout.splitlines()
    assert "seed: 7  # command line" in done.stdout.splitlines()
    write("again.yaml", done.stdout)
    assert fasttrain("validate", "again.yaml").returncode == 0


def test_schema_prints_json(fasttrain):
    done = fasttrain("schema")
    assert done.returncode == 0
    assert done.stdout == (ROOT / "configs/schema.json").read_text()
    assert json.loads(done.stdout)["$defs"]["optimizer.adamw"]


HEAVY = ("torch", "transformers", "datasets", "numpy", "pyarrow", "peft", "fasttrain_kernels")


@pytest.mark.parametrize(
    "call",
    [
        "from fasttrain.cli.validate import validate; validate('sft.yaml')",
        "from fasttrain.cli.show_config import show_config; show_config('sft.yaml')",
        "from fasttrain.cli.schema import schema; schema('sft.yaml')",
    ],
)
def test_no_verb_loads_torch(fasttrain, call):
    check = f"{call}\nimport sys\nprint([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    done = fasttrain(python=("-c", check))
    assert (done.returncode, done.stderr) == (0, "[]\n")


def test_importing_a_verb_loads_nothing_heavy(fasttrain):
    names = ("validate", "show_config", "schema")
    imports = "; ".join(f"import fasttrain.cli.{name}" for name in names)
    check = f"{imports}\nimport sys\nprint('pydantic' in sys.modules, 'yaml' in sys.modules)"
    assert fasttrain(python=("-c", check)).stdout == "False False\n"
