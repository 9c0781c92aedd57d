"""What README and kernels/README show works, as a user would copy it."""

import json
import re
from textwrap import dedent

import pytest
import torch
import yaml
from documents import ROOT, blocks
from tiny import CONFIG

import fasttrain
from fasttrain.core.events import Callback

SOURCE, METHOD = blocks(ROOT / "README.md", "python")


def config_beside(code):
    """The YAML that stands in comments beside the imports of a sample."""
    comments = re.findall(r"^from .*?  # (.*)$", code, re.MULTILINE)
    return yaml.safe_load("\n".join(comments))


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "ok"}]}
        for i in range(20)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(workspace, code, config):
    (workspace / "my_code.py").write_text(code)
    (workspace / "sft.yaml").write_text(yaml.safe_dump({"extends": "base.yaml", **config}))
    return fasttrain.run("sft.yaml")


def test_a_data_source(workspace, capsys):
    result = train(workspace, SOURCE.text, config_beside(SOURCE.text))
    assert result.finished
    assert "tickets: question/answer" in capsys.readouterr().out


def test_a_method(workspace):
    config = {"imports": ["./my_code.py"], **config_beside(METHOD.text)}
    result = train(workspace, METHOD.text, config)
    plain = fasttrain.run("base.yaml", ["output_dir=plain"])
    assert result.finished
    assert 0 < result.loss < plain.loss  # what is sure already counts less
    same = fasttrain.run("sft.yaml", ["output_dir=same", "trainer.gamma=0"])
    assert same.loss == pytest.approx(plain.loss, rel=1e-6)


def test_from_python(workspace):
    text = (ROOT / "README.md").read_text()
    [call] = re.findall(r"`(fasttrain\.run\([^`]*\))`", text)
    (workspace / "sft.yaml").write_text(yaml.safe_dump(CONFIG))
    seen = []

    class MyCallback(Callback):
        def on_log(self, run, record):
            seen.append(record.step)

    result = eval(call, {"fasttrain": fasttrain, "MyCallback": MyCallback})
    assert result.step == len(seen) == 100


def test_kernels_alone(monkeypatch):
    monkeypatch.delenv("FASTTRAIN_KERNELS", raising=False)
    [block] = blocks(ROOT / "kernels/README.md", "python")
    names = {
        "x": torch.randn(4, 64),
        "weight": torch.ones(64),
        "hidden": torch.randn(4, 64),
        "head": torch.randn(100, 64),
        "labels": torch.tensor([3, 99, -100, 0]),
    }
    exec(dedent(block.text), names)
    assert names["y"].shape == (4, 64)
    normed = torch.nn.functional.rms_norm(names["x"] + names["hidden"], (64,), eps=1e-6)
    plain = torch.nn.functional.cross_entropy(normed @ names["head"].T, names["labels"])
    torch.testing.assert_close(names["loss"], plain)
