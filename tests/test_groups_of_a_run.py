"""Parameter groups as a run makes them of its config."""

import json

from tiny import CONFIG

from fasttrain.config.load import load
from fasttrain.core.build import run
from fasttrain.core.events import Callback


class Look(Callback):
    """Notes the optimizer's groups."""

    def on_optimizer_created(self, run, optimizer):
        self.groups = [
            (group["name"], group["lr"], group["weight_decay"], len(group["params"]))
            for group in optimizer.param_groups
        ]


def test_roles_rules_and_frozen_parameters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {"prompt": "the quick brown fox", "completion": "jumps over a lazy dog"}
    (tmp_path / "chats.jsonl").write_text((json.dumps(row) + "\n") * 20)
    rule = {"match": "*.mlp.*", "learning_rate_scale": 0.5}
    settings = {
        "model": {**CONFIG["model"], "freeze": "*embed_tokens*"},
        "optimizer": {"learning_rate": 0.01, "weight_decay": 0.1, "rules": [rule]},
    }
    look = Look()
    run(load({**CONFIG, **settings}), dry_run=True, callbacks=[look])
    assert look.groups == [
        ("matrices", 0.01, 0.1, 4),
        ("matrices · *.mlp.*", 0.005, 0.1, 3),
        ("head", 0.01, 0.1, 1),
        ("vectors", 0.01, 0.0, 3),
    ]
