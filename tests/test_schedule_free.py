"""A schedule-free run evaluates, writes samples and exports its average."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import CONFIG

import fasttrain
from fasttrain.core.events import Callback
from fasttrain.model.language_model import HFLanguageModel

BETA = 0.8
NAME = "model.layers.0.mlp.up_proj.weight"


class Look(Callback):
    """Notes a weight in evaluations."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def wrap_evaluate(self, run, call):
        self.seen[run.step] = weight_of(run.model)
        return call()


def weight_of(model):
    return model.get_parameter(f"causal_lm.{NAME}").detach().clone()


def test_what_is_used_is_the_average(tmp_path, monkeypatch):
    pytest.importorskip("schedulefree")
    monkeypatch.chdir(tmp_path)
    row = {"prompt": "the quick brown fox", "completion": "jumps over a lazy dog"}
    rows = "".join(json.dumps({**row, "prompt": f"{n} {row['prompt']}"}) + "\n" for n in range(40))
    (tmp_path / "chats.jsonl").write_text(rows)
    written = []

    def generate(model, prompts, **options):
        written.append(weight_of(model))
        return ["" for _ in prompts]

    monkeypatch.setattr(HFLanguageModel, "generate", generate)
    look = Look()
    config = {
        **CONFIG,
        "data": {**CONFIG["data"], "eval_split": 0.1},
        "optimizer": {
            "type": "schedule_free_adamw", "learning_rate": 1e-2, "betas": [BETA, 0.99],
        },
        "scheduler": "constant",
        "eval": {"every_steps": 2},
        "checkpoint": ["sharded", "huggingface"],
        "callbacks": ["samples"],
        "output_dir": "run",
    }  # fmt: skip
    fasttrain.run(config, callbacks=[look])
    exported = load_file("run/model/model.safetensors")[NAME]
    (saved,) = tmp_path.glob("run/checkpoints/step-00000003/rank-0000")
    trained = load_file(saved / "model.safetensors")[f"causal_lm.{NAME}"]
    z = load_file(saved / "optimizer.safetensors")[f"causal_lm.{NAME}/z"]
    torch.testing.assert_close(exported, (trained - (1 - BETA) * z) / BETA, rtol=1e-5, atol=1e-7)
    assert (exported - trained).abs().max() > 1e-4
    assert list(look.seen) == [2, 3]
    assert torch.equal(look.seen[3], exported)
    assert torch.equal(written[-1], exported)
    assert torch.equal(written[-2], look.seen[2])
