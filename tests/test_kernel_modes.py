"""A run learns the same whichever kernels serve it: eager, by itself, or each of them by name."""

import copy
import functools
import json

import pytest
from fasttrain_kernels import native
from tiny import CONFIG

import fasttrain
from fasttrain.config.kernel_rules import backends_of, ops
from fasttrain.core.events import Callback

STEPS = 8
# Kernels and eager PyTorch differ by roundings of float32. AdamW hands those on: after eight steps
# losses were 5e-7 apart at most. A gradient that is wrong by 1 % makes more than 1e-4 of it.
SAME = 1e-5

ARCHITECTURES = {
    "llama": {},
    "gemma2": {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16},
    "qwen3": {"head_dim": 16},
}
# What a CPU can run without compiling first.
BY_NAME = {
    "cpu": {op: "cpu" for op in ops() if "cpu" in backends_of(op)},
    "sdpa": {"packed_attention": "sdpa"},
}

pytestmark = pytest.mark.skipif(
    native.why_not("_C_cpu") is not None, reason=f"{native.why_not('_C_cpu')}"
)


class Seen(Callback):
    """The losses, and what served which op."""

    def __init__(self):
        super().__init__()
        self.losses, self.backends = [], {}

    def on_kernels_selected(self, run, record):
        for site in record.sites:
            self.backends.setdefault(site.op, set()).add(site.backend)

    def on_log(self, run, record):
        self.losses.append(record.loss)


def train(directory, architecture, **kernels):
    chats = directory / "chats.jsonl"
    with chats.open("w") as file:
        for number in range(40):
            messages = [
                {"role": "user", "content": f"what is {number} plus one"},
                {"role": "assistant", "content": f"it is {number + 1}" * (1 + number % 3)},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    config = copy.deepcopy(CONFIG) | {
        "data": {"sources": [str(chats)], "max_length": 64, "cache_dir": str(directory / "cache")},
        "max_steps": STEPS,
        "checkpoint": [],
        "kernels": kernels,
        "output_dir": str(directory / "run"),
        "resume": "never",
    }
    config["model"]["architecture"] = architecture
    config["model"]["config"] |= ARCHITECTURES[architecture] | {"num_hidden_layers": 2}
    seen = Seen()
    fasttrain.run(config, callbacks=[seen])
    return seen


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    """architecture -> what a run without kernels sees."""

    @functools.cache
    def seen(architecture):
        found = train(tmp_path_factory.mktemp(architecture), architecture, mode="eager")
        assert all(backends == {"eager"} for backends in found.backends.values())
        assert len(found.losses) == STEPS and found.losses[-1] < 0.9 * found.losses[0]
        return found

    return seen


@pytest.mark.parametrize(
    ("architecture", "way"),
    [
        (architecture, way)
        for architecture in ARCHITECTURES
        for way in ("auto", "strict", *BY_NAME)
        if (architecture, way) != ("gemma2", "sdpa")  # which has no softcap and no window
    ],
)
def test_the_loss_curve_is_that_of_eager(eager, architecture, way, tmp_path):
    expected = eager(architecture)
    kernels = {"mode": way}
    if way in BY_NAME:
        present = expected.backends.keys()
        kernels = {op: backend for op, backend in BY_NAME[way].items() if op in present}
    seen = train(tmp_path, architecture, **kernels)
    assert seen.losses == pytest.approx(expected.losses, rel=SAME)
    asked = kernels if way in BY_NAME else dict.fromkeys(expected.backends, "cpu")
    assert all(seen.backends[op] == {backend} for op, backend in asked.items())
