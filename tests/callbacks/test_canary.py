"""A wrong kernel is found while the run goes on, named, and dealt with; a right one changes no bit.

Faults are planted after the self-test has passed, as by a driver that was updated under a cache.
"""

import copy
import json
import logging

import pytest
import torch
from fasttrain_kernels import choose, native
from fasttrain_kernels.ops.rms_norm import cpu_kernel
from tiny import CONFIG

import fasttrain

pytestmark = pytest.mark.skipif(
    native.why_not("_C_cpu") is not None, reason=f"{native.why_not('_C_cpu')}"
)
EVERY = {"type": "canary", "every_steps": 2}


@pytest.fixture(autouse=True)
def alone(own_cache, caplog):
    caplog.set_level(logging.INFO, "fasttrain")


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    rows = [
        [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n} " * 5}]
        for n in range(40)
    ]
    path.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    return path


def train(directory, chats, *canary, **overrides):
    config = copy.deepcopy(CONFIG) | {
        "data": {"sources": [str(chats)], "max_length": 64, "cache_dir": str(directory / "tokens")},
        "callbacks": list(canary),
        "checkpoint": [],
        "max_steps": 5,
        "output_dir": str(directory / "run"),
        "resume": "never",
    }
    config["model"]["config"]["attention_dropout"] = 0.1  # draws random numbers in each pass
    result = fasttrain.run(config, overrides)
    lines = (directory / "run" / "metrics.jsonl").read_text().splitlines()
    return result, [json.loads(line) for line in lines if "loss" in json.loads(line)]


def plant(monkeypatch, factor):
    """From now on the C++ kernel's gradients are off by a factor."""

    def wrong(*arguments, real=cpu_kernel.backward):
        dx, dweight = real(*arguments)
        return dx * factor, dweight

    monkeypatch.setattr(cpu_kernel, "backward", wrong)


def prove():
    for residual in (None, torch.float32):
        facts = {"device": "cpu", "dtype": torch.float32, "width": 32, "residual_dtype": residual}
        assert choose("rms_norm", **facts).backend == "cpu"


def test_a_run_with_a_canary_learns_the_same_bits(tmp_path, chats):
    losses = []
    for name, canary in (("with", [EVERY]), ("without", [])):
        (tmp_path / name).mkdir()
        _, lines = train(tmp_path / name, chats, *canary)
        losses.append([(line["loss"], line["grad_norm"]) for line in lines])
        keys = [key for line in lines for key in line if key.startswith("canary")]
        pair = ["canary_loss_difference", "canary_gradient_difference"]
        assert keys == (3 * pair if canary else [])
        if canary:  # steps 1, 3 and 5
            assert all(0 <= lines[0][key] < 1e-5 for key in pair)
            assert pair[0] in lines[2] and pair[0] not in lines[1]
    assert losses[0] == losses[1]


def test_a_wrong_gradient_is_found_and_its_kernel_named(tmp_path, chats, monkeypatch, caplog):
    prove()
    plant(monkeypatch, 1.1)
    _, lines = train(tmp_path, chats, EVERY)
    assert lines[0]["canary_loss_difference"] < 1e-5
    assert 1e-3 < lines[0]["canary_gradient_difference"] < 1
    warned = [record.message for record in caplog.records if "canary" in record.message]
    assert len(warned) == 3 and "the culprit is rms_norm" in warned[0]
    assert warned[0].startswith("canary: step 1: kernels and references differ by more than 0.001")
    assert choose("rms_norm", device="cpu", dtype=torch.float32, width=32).backend == "cpu"


def test_the_policy_stop_ends_the_run(tmp_path, chats, monkeypatch):
    prove()
    plant(monkeypatch, 1.1)
    result, _ = train(tmp_path, chats, EVERY | {"policy": "stop"})
    assert result.exit_code == 1 and result.step == 1
    assert "(canary, policy stop)" in result.reason


def test_a_kernel_that_writes_nan_is_found_without_a_canary(tmp_path, chats, monkeypatch):
    prove()
    plant(monkeypatch, float("nan"))
    result, lines = train(tmp_path, chats)
    assert result.finished and all(line["loss"] < 10 for line in lines)
    row = choose("rms_norm", device="cpu", dtype=torch.float32, width=32)
    reasons = {each.backend: each.reason for each in row.rejected}
    assert "its backward pass gives values that are not finite" in reasons["cpu"]


def test_the_policy_quarantine_goes_on_without_the_kernel(tmp_path, chats, monkeypatch, caplog):
    prove()
    plant(monkeypatch, 1.1)
    result, lines = train(tmp_path, chats, EVERY | {"policy": "quarantine"})
    assert result.finished
    assert lines[2]["canary_gradient_difference"] < 1e-5
    row = choose("rms_norm", device="cpu", dtype=torch.float32, width=32)
    assert row.backend == "eager"
    reason = {each.backend: each.reason for each in row.rejected}["cpu"]
    assert reason.startswith("in quarantine: canary: loss")


def test_without_kernels_there_is_nothing_to_compare(tmp_path, chats, caplog):
    _, lines = train(tmp_path, chats, EVERY, **{"kernels.mode": "eager"})
    assert not any(key.startswith("canary") for line in lines for key in line)
    told = [record.message for record in caplog.records if "nothing to compare" in record.message]
    assert len(told) == 1
