"""Whatever the settings, a run in pieces is the run in one piece, bit for bit."""

import json
import random
from hashlib import sha256

import pytest
from tiny import CONFIG

import fasttrain

FIELDS = ("step", "epoch", "loss", "lr", "grad_norm", "tokens", "supervised_tokens", "eval_loss")
WORDS = "the quick brown fox jumps over a lazy dog".split()  # noqa: SIM905
STEPS, PIECE = 7, 3  # neither evaluations nor logged intervals end where a piece does
PACKAGES = ("schedulefree", "bitsandbytes")  # settings that need one
SETTINGS = {
    "overfit_first_batch": {"overfit_first_batch": True},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16": {"precision": "bf16"},
    "a short last step": {"micro_batch_size": 2, "gradient_accumulation_steps": 5},
    "rules and frozen weights": {
        "optimizer": {
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "rules": [{"match": ["*.mlp.*"], "learning_rate_scale": 0.5}],
            "layer_decay": 0.9,
        },
        "model": {**CONFIG["model"], "freeze": ["*embed_tokens*", "*.q_proj.*"]},
    },
    "adafactor": {"optimizer": {"type": "adafactor", "weight_decay": 0.1}},
    "schedulefree": {
        "optimizer": {"type": "schedule_free_adamw", "learning_rate": 1e-2},
        "scheduler": {"type": "constant", "warmup_steps": 2},
        "callbacks": ["samples"],
    },
    "bitsandbytes": {"optimizer": {"type": "bitsandbytes_adamw", "learning_rate": 1e-2}},
    "callbacks": {"callbacks": ["samples", "early_stopping", "unigram_baseline"]},
    "adapters with dropout": {
        "tokenizer": {},
        "model": {
            "name_or_path": "base/model",
            "transforms": [{"type": "lora", "r": 4, "dropout": 0.2}, "activation_checkpoint"],
            "freeze": ["*.up_proj.lora_A.*"],
        },
    },
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A directory with chats, and the export of a short run for adapters to sit in."""
    directory = tmp_path_factory.mktemp("resume")
    chance = random.Random(0)
    rows = [
        {
            "prompt": " ".join(chance.choices(WORDS, k=chance.randint(3, 12))),
            "completion": " ".join(chance.choices(WORDS, k=chance.randint(3, 15))),
        }
        for _ in range(40)
    ]
    (directory / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        fasttrain.run({**CONFIG, "max_steps": 1, "output_dir": "base"})
    return directory


def settings(**changes):
    return {
        **CONFIG,
        "data": {**CONFIG["data"], "max_length": 128, "eval_split": 0.1},
        "max_steps": STEPS,
        "eval": {"every_steps": 4, "at_start": True},
        "logging": {"every_steps": 2},
        "checkpoint": [{"type": "sharded"}, {"type": "huggingface"}],
        **changes,
    }


def content(directory):
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    newest = max((directory / "checkpoints").glob("step-*"))
    files = [*(directory / "model").glob("*.safetensors"), *newest.glob("rank-*/*")]
    assert len(files) == 4
    rows = [tuple(line.get(name) for name in FIELDS) for line in lines]
    return rows, {
        str(file.relative_to(directory)): sha256(file.read_bytes()).hexdigest() for file in files
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_in_pieces_is_the_run_in_one(name, workspace, monkeypatch):
    if name in PACKAGES:
        pytest.importorskip(name)
    monkeypatch.chdir(workspace)
    own = f"run-{list(SETTINGS).index(name)}"
    config = settings(**SETTINGS[name])
    whole = fasttrain.run({**config, "output_dir": f"{own}-whole"})
    pieces = [
        fasttrain.run({**config, "output_dir": f"{own}-pieces", "stop_after": PIECE})
        for _ in range(-(-STEPS // PIECE))
    ]
    assert [piece.finished for piece in pieces] == [False, False, True]
    assert content(pieces[-1].directory) == content(whole.directory)
