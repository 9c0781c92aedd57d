"""One optimizer step: the same documents give the same loss and gradients however they are split,
packed or padded, and as plain transformers with eager attention computes them one by one."""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

import fasttrain
from fasttrain.core.batch import IGNORED_LABEL
from fasttrain.core.events import Callback

LOSS_RTOL = 1e-5
GRADIENT_RTOL = 1e-5
# A tensor whose gradient is smaller than this share of the whole is held to the share instead:
# its own rounding noise comes from the larger ones.
FLOOR = 1e-2

SPLITS = {"1x8": (1, 8), "2x4": (2, 4), "8x1": (8, 1)}
WORDS = "the cat sat on a mat and then it ran far away over green hills".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """64 chats of one to three turns and very different lengths."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    with path.open("w") as file:
        for _ in range(64):
            messages = []
            for _ in range(rng.randint(1, 3)):
                for role in ("user", "assistant"):
                    text = " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))
                    messages.append({"role": role, "content": text})
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


class Capture(Callback):
    """The first step: its initial model, documents, loss and gradients."""

    def __init__(self, directory):
        super().__init__()
        self.directory = directory
        self.documents = []
        self.gradients = {}

    def on_train_start(self, run, record):
        run.model.save_pretrained(self.directory, dtype=None)

    def on_step_start(self, run, record):
        for batch in record.batch.micro_batches:
            lengths = batch.layout.lengths
            ids, labels = batch.input_ids.split(lengths), batch.labels.split(lengths)
            self.documents += list(zip(ids, labels, strict=True))

    def wrap_optimizer_step(self, run, call, skip):
        for name, parameter in run.model.named_parameters():
            self.gradients[name] = parameter.grad.clone()
        call(skip)

    def on_step_end(self, run, record):
        self.loss = record.result.loss_sum.item() / record.result.num_supervised


def one_step(chats, directory, *, micro=1, accumulation=8, **overrides):
    capture = Capture(directory / "initial")
    config = {
        "model": {
            "type": "random",
            "architecture": "llama",
            "config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
            },
        },
        "tokenizer": {"type": "trained", "vocab_size": 320},
        "data": {"sources": [str(chats)], "max_length": 128, "cache_dir": str(directory / "cache")},
        "micro_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "max_grad_norm": 0,
        "engine": {"device": "cpu"},
        "checkpoint": [],
        "output_dir": str(directory / "run"),
    }
    fasttrain.run(config, overrides, callbacks=[capture])
    return capture


def assert_same_gradients(ours, reference):
    assert ours.keys() == reference.keys()
    whole = torch.stack([g.norm() for g in reference.values()]).norm()
    for name, expected in reference.items():
        error = (ours[name] - expected).norm()
        assert error <= GRADIENT_RTOL * max(expected.norm(), FLOOR * whole), name


def plain_pytorch(capture):
    """Loss and gradients of the captured documents, one by one, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(
        capture.directory, attn_implementation="eager", dtype=torch.float32
    )
    supervised = sum(int((labels != IGNORED_LABEL).sum()) for _, labels in capture.documents)
    total = 0.0
    for ids, labels in capture.documents:
        logits = model(ids[None]).logits[0]
        loss = torch.nn.functional.cross_entropy(
            logits, labels, ignore_index=IGNORED_LABEL, reduction="sum"
        )
        (loss / supervised).backward()
        total += loss.item()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return total / supervised, gradients


@pytest.fixture(scope="module")
def reference(chats, tmp_path_factory):
    capture = one_step(chats, tmp_path_factory.mktemp("reference"))
    return capture, *plain_pytorch(capture)


def by_suffix(gradients, names):
    """Gradients under transformers' own parameter names, whatever wraps the model."""
    return {name: next(g for ours, g in gradients.items() if ours.endswith(name)) for name in names}


def test_ours_is_what_plain_pytorch_computes(reference):
    capture, loss, gradients = reference
    assert len(capture.documents) > 8  # packed
    assert capture.loss == pytest.approx(loss, rel=LOSS_RTOL)
    assert_same_gradients(by_suffix(capture.gradients, gradients), gradients)


@pytest.mark.parametrize("form", ["per_document", "padded"])
@pytest.mark.parametrize("split", SPLITS)
def test_any_split_packed_or_padded(chats, tmp_path, reference, split, form):
    _, loss, gradients = reference
    micro, accumulation = SPLITS[split]
    capture = one_step(
        chats, tmp_path, micro=micro, accumulation=accumulation, **{"model.attention": form}
    )
    assert capture.loss == pytest.approx(loss, rel=LOSS_RTOL)
    assert_same_gradients(by_suffix(capture.gradients, gradients), gradients)


@pytest.mark.parametrize("split", SPLITS)
def test_any_split_unpacked(chats, tmp_path, split):
    micro, accumulation = SPLITS[split]
    capture = one_step(
        chats, tmp_path, micro=micro, accumulation=accumulation, **{"data.packing": False}
    )
    assert len(capture.documents) == 8
    loss, gradients = plain_pytorch(capture)
    assert capture.loss == pytest.approx(loss, rel=LOSS_RTOL)
    assert_same_gradients(by_suffix(capture.gradients, gradients), gradients)
