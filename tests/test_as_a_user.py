"""Extending a run as a user would: files of one's own, named in the YAML or given in Python."""

import json
import subprocess
import sys
from hashlib import sha256
from textwrap import dedent

import pytest
import yaml
from tiny import CONFIG

import fasttrain
from fasttrain.config.errors import UserError

OWN_CODE = '''
from fasttrain.config.registry import CALLBACKS, TRAINERS
from fasttrain.config.schema.callback import CallbackSection
from fasttrain.config.schema.trainer import TrainerSection
from fasttrain.core.events import Callback
from fasttrain.core.batch import LossSum
from fasttrain.trainers.sft import SFTTrainer


class DoubledConfig(CallbackSection):
    """Multiplies the loss."""

    factor: float = 2.0
    """By this."""


@CALLBACKS.register("doubled")
class Doubled(Callback):
    Config = DoubledConfig

    def wrap_loss(self, run, call, model, batch):
        part = call(model, batch)
        return LossSum(part.sum * self.config.factor, part.count)


class Observer(Callback):
    Config = CallbackSection

    def on_step_end(self, run, record):
        with open(run.directory / "seen.txt", "a") as file:
            file.write(f"{record.step}\\n")


class HalvedConfig(TrainerSection):
    """A loss of one's own."""

    share: float = 0.5
    """Of the usual loss."""


@TRAINERS.register("halved")
class HalvedTrainer(SFTTrainer):
    Config = HalvedConfig

    def loss(self, model, batch):
        losses = model.token_losses(batch, reduction="none")
        return LossSum(losses.sum() * self.config.share, batch.num_supervised)


class Misspelt(Callback):
    Config = CallbackSection

    def on_stepend(self, run, record):
        pass
'''


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "ok"}]}
        for i in range(40)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_code.py").write_text(dedent(OWN_CODE))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def losses(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def train(name, **settings):
    result = fasttrain.run({**CONFIG, "output_dir": name, **settings})
    assert result.finished
    return losses(result.directory)


def test_a_wrapper_that_doubles_the_loss(workspace):
    plain = train("plain")
    doubled = train(
        "doubled", imports=["./my_code.py"], callbacks=[{"type": "doubled", "factor": 2.0}]
    )
    assert doubled[0] == pytest.approx(2 * plain[0], rel=1e-6)


def test_an_observer_by_module_and_class(workspace):
    train("observed", imports=["./my_code.py"], callbacks=["my_code:Observer"])
    assert (workspace / "observed/seen.txt").read_text() == "1\n2\n3\n"


def test_a_trainer_with_its_own_loss(workspace):
    plain = train("plain")
    halved = train("halved", imports=["./my_code.py"], type="halved")
    quarter = train("quarter", imports=["./my_code.py"], type="halved", trainer={"share": 0.25})
    assert halved[0] == pytest.approx(plain[0] / 2, rel=1e-6)
    assert quarter[0] == pytest.approx(plain[0] / 4, rel=1e-6)


def test_a_misspelt_hook_is_refused_with_the_list(workspace):
    with pytest.raises(UserError) as caught:
        train("misspelt", imports=["./my_code.py"], callbacks=["my_code:Misspelt"])
    assert "on_stepend" in str(caught.value)
    assert "on_step_end" in str(caught.value)
    assert not (workspace / "misspelt").exists()


def fingerprint(directory):
    weights = (directory / "model/model.safetensors").read_bytes()
    return losses(directory), sha256(weights).hexdigest()


def test_python_twice_in_one_process_gives_what_the_command_gives(workspace):
    (workspace / "sft.yaml").write_text(yaml.safe_dump(CONFIG))
    first = fasttrain.run("sft.yaml", ["output_dir=first"])
    second = fasttrain.run("sft.yaml", {"output_dir": "second"})
    command = [sys.executable, "-m", "fasttrain", "run", "sft.yaml", "output_dir=third"]
    subprocess.run(command, check=True, capture_output=True)
    assert fingerprint(first.directory) == fingerprint(second.directory)
    assert fingerprint(first.directory) == fingerprint(workspace / "third")
