"""What is decided before the blocks are made."""

import pytest
import torch

from fasttrain.callbacks.kernel_selection import KernelSelection
from fasttrain.config.errors import UserError
from fasttrain.config.load import load
from fasttrain.config.schema.model import (
    ActivationCheckpointConfig,
    CompileConfig,
    LoraConfig,
)
from fasttrain.core.build import build_callbacks, build_engine, ordered_transforms
from fasttrain.core.events import Callback
from fasttrain.trainers.sft import SFTTrainer

MINIMAL = {
    "model": {"type": "random"},
    "tokenizer": {"type": "trained"},
    "data": {"sources": ["python_stdlib"], "eval_split": 0.1},
}


def config(**settings):
    return load({**MINIMAL, **settings}).config


def pretend_gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)


def test_several_gpus_are_refused_with_what_to_do(monkeypatch):
    pretend_gpus(monkeypatch, 2)
    with pytest.raises(UserError, match=r"2 GPUs are visible.*CUDA_VISIBLE_DEVICES=0"):
        build_engine(config())
    assert build_engine(config(engine={"device": "cpu"})).device.type == "cpu"


def test_one_gpu_is_used_in_mixed_precision(monkeypatch):
    pretend_gpus(monkeypatch, 1)
    engine = build_engine(config())
    assert engine.device.type == "cuda"
    assert engine.precision.parameters == engine.precision.autocast == torch.bfloat16
    assert engine.precision.masters
    precision = build_engine(config(optimizer="adafactor")).precision
    assert (precision.parameters, precision.autocast) == (torch.float32, torch.bfloat16)


def test_a_gpu_that_is_not_there(monkeypatch):
    pretend_gpus(monkeypatch, 0)
    with pytest.raises(UserError, match=r"engine\.device: no CUDA device"):
        build_engine(config(engine={"device": "cuda"}))
    assert build_engine(config()).precision.name == "fp32"


@pytest.mark.parametrize(
    ("listed", "order"),
    [
        ([], ["kernels"]),
        ([LoraConfig()], ["lora", "kernels"]),
        (
            [LoraConfig(), ActivationCheckpointConfig(), CompileConfig()],
            ["lora", "kernels", "activation_checkpoint", "compile"],
        ),
        ([ActivationCheckpointConfig()], ["kernels", "activation_checkpoint"]),
    ],
)
def test_kernels_take_their_place_among_the_transforms(listed, order):
    assert [section.type for section in ordered_transforms(listed)] == order


def test_the_choice_of_kernels_is_innermost_and_a_class_derived_from_it_takes_its_place():
    class Mine(KernelSelection):
        pass

    extra = Callback()
    built = build_callbacks(config(), SFTTrainer, [extra])
    assert type(built[-1]) is KernelSelection and built[-2] is extra
    mine = Mine()
    built = build_callbacks(config(), SFTTrainer, [mine, extra])
    assert [each for each in built if isinstance(each, KernelSelection)] == [mine]
    assert built[-1] is extra


def test_a_listed_callback_sets_the_options_of_the_one_that_is_always_there():
    listed = config(callbacks=[{"type": "nonfinite_guard", "policy": "skip"}, "samples"])
    mine = Callback()
    built = build_callbacks(listed, SFTTrainer, [mine])
    names = [type(callback).__name__ for callback in built]
    assert names.count("NonFiniteGuard") == 1
    assert built[names.index("NonFiniteGuard")].config.policy == "skip"
    assert names[-3:] == ["Samples", "Callback", "KernelSelection"]
    assert built[-2] is mine
