"""The loss of the fused head is the loss of the model's own logits, gradients included."""

from dataclasses import replace

import pytest
import torch
from fasttrain_kernels import native
from model.tiny_models import (
    assert_same_gradients,
    causal_lm,
    documents,
    gradients,
    language_model,
    packed,
    tokenizer,
)
from torch import nn

from fasttrain.callbacks.kernel_selection import KernelSelection
from fasttrain.config.schema.kernels import KernelsConfig
from fasttrain.config.schema.model import (
    HuggingFaceModelConfig,
    KernelsTransformConfig,
    LoraConfig,
)
from fasttrain.core.batch import IGNORED_LABEL, BatchProfile
from fasttrain.core.kernel_plan import KernelPlan
from fasttrain.model.hf import HuggingFaceModelFactory
from fasttrain.model.transforms.kernels import KernelsTransform, revert
from fasttrain.model.transforms.lora import LoraTransform
from fasttrain.runtime.precision import choose_precision

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    native.why_not("_C_cpu") is not None, reason=f"no CPU kernel: {native.why_not('_C_cpu')}"
)

# Architecture and overrides: plain, softcapped, divided, multiplied, with a bias, tied and not.
HEADS = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"final_logit_softcapping": 3.0}),
    "granite": ("granite", {}),
    "cohere2": ("cohere2", {}),
    "phi": ("phi", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "gpt2": ("gpt2", {}),
    "mamba": ("mamba", {}),
}


def fuse(model, dtype=torch.float32):
    """The fused loss, and no other kernel."""
    profile = BatchProfile(CPU, dtype, tokens=64, document_lengths=())
    plan = KernelSelection().plan(model, profile, KernelsConfig(rms_norm="auto", mode="auto"))
    site = next(site for site in plan.sites if site.op == "linear_cross_entropy")
    assert site.backend == "cpu"
    return KernelsTransform(KernelsTransformConfig()).apply(model, plan=KernelPlan((site,)))


def loss_and_gradients(model, batch, reduction="sum"):
    model.zero_grad()
    losses = model.token_losses(batch, reduction=reduction)
    weights = torch.linspace(0.5, 1.5, losses.numel()).view(losses.shape)
    (losses * weights).sum().backward()
    return losses.detach(), {name: g.clone() for name, g in gradients(model).items()}


def without_logits(model, run):
    """What `run` returns; an error where the output layer is called on the way."""

    def refuse(*_args):
        raise AssertionError("the output layer made logits")

    forward = nn.Linear.forward
    layer = model.head.layer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            nn.Linear, "forward", lambda self, x: refuse() if self is layer else forward(self, x)
        )
        return run()


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("case", HEADS)
def test_it_is_the_loss_of_the_logits(case, reduction):
    architecture, overrides = HEADS[case]
    model = language_model(architecture, **overrides)
    batch = packed(documents())
    expected, before = loss_and_gradients(model, batch, reduction)
    fuse(model)
    found, after = without_logits(model, lambda: loss_and_gradients(model, batch, reduction))
    assert found.shape == expected.shape and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert_same_gradients(after, before)


def test_reverting_makes_logits_again():
    model = fuse(language_model())
    batch = packed(documents())
    fused = model.token_losses(batch)
    revert(model)
    assert model.loss_backend is None
    torch.testing.assert_close(model.token_losses(batch), fused, rtol=1e-6, atol=0)


def test_evaluation_takes_the_same_path():
    model = fuse(language_model("gemma2", final_logit_softcapping=3.0))
    batch = packed(documents())
    trained = model.token_losses(batch).detach()
    with torch.no_grad():
        evaluated = without_logits(model, lambda: model.eval().token_losses(batch))
    torch.testing.assert_close(evaluated, trained, rtol=1e-6, atol=0)


def test_a_users_own_loss_can_still_ask_for_logits():
    model = fuse(language_model())
    batch = packed(documents())
    logits = model.logits(batch)
    own = nn.functional.cross_entropy(
        logits, batch.labels, ignore_index=IGNORED_LABEL, reduction="sum"
    )
    torch.testing.assert_close(model.token_losses(batch), own, rtol=1e-5, atol=0)


def test_nothing_supervised_is_a_loss_of_zero_with_a_graph():
    model = fuse(language_model())
    batch = packed(documents())
    empty = replace(
        batch,
        labels=torch.full_like(batch.labels, IGNORED_LABEL),
        supervised_index=batch.supervised_index[:0],
        num_supervised=0,
    )
    loss = model.token_losses(empty)
    assert loss == 0
    loss.backward()
    assert all(not gradient.any() for gradient in gradients(model).values())


def test_under_bf16_autocast():
    model = language_model()
    batch = packed(documents())
    with torch.autocast("cpu", torch.bfloat16):
        expected, before = loss_and_gradients(model, batch)
        found, after = loss_and_gradients(fuse(model, torch.bfloat16), batch)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
    assert_same_gradients(after, before, rtol=5e-2, floor=1e-1)


def test_a_hook_that_comes_later_is_obeyed_and_said():
    model = fuse(language_model())
    batch = packed(documents())
    fused = model.token_losses(batch)
    model.head.layer.register_forward_hook(lambda _module, _args, logits: logits * 0)
    with pytest.warns(UserWarning, match="the loss is made of logits from here on: .*hooks"):
        losses = model.token_losses(batch)
    assert not torch.isclose(losses, fused)


# --- adapters -----------------------------------------------------------------------------------


def adapted(directory, targets, **options):
    causal_lm("llama").save_pretrained(directory)
    factory = HuggingFaceModelFactory(HuggingFaceModelConfig(name_or_path=str(directory)))
    precision = choose_precision("fp32", CPU)
    model = factory.build(tokenizer=tokenizer(), precision=precision, device=CPU)
    config = LoraConfig(target_modules=targets, r=4, alpha=8.0, **options)
    model = LoraTransform(config).apply(model, plan=KernelPlan())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # B begins as zeros
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("targets", [["q_proj"], ["lm_head"], ["lm_head", "v_proj"]], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_with_adapters_on_the_head_and_off_it(tmp_path, targets, reduction):
    model = adapted(tmp_path, targets)
    batch = packed(documents())
    expected, before = loss_and_gradients(model, batch, reduction)
    fuse(model)
    found, after = without_logits(model, lambda: loss_and_gradients(model, batch, reduction))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert before.keys() == after.keys() and all("lora_" in name for name in after)
    assert_same_gradients(after, before)


def test_with_an_adapter_on_the_head_under_autocast(tmp_path):
    model = adapted(tmp_path, ["lm_head"])
    batch = packed(documents())
    with torch.autocast("cpu", torch.bfloat16):
        expected, before = loss_and_gradients(model, batch)
        found, after = loss_and_gradients(fuse(model, torch.bfloat16), batch)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
    assert_same_gradients(after, before, rtol=5e-2, floor=1e-1)


def test_a_hook_on_an_adapter_keeps_the_head_eager(tmp_path):
    model = adapted(tmp_path, ["lm_head"])
    model.head.layer.lora_A["default"].register_forward_hook(lambda *_arguments: None)
    assert "adapters" in (model.head.why_not_fused() or "")


def test_with_adapters_switched_off(tmp_path):
    model = adapted(tmp_path, ["lm_head"])
    batch = packed(documents())
    fuse(model)
    with model.adapters.peft_model.disable_adapter():
        found = model.token_losses(batch)
        revert(model)
        torch.testing.assert_close(found, model.token_losses(batch), rtol=1e-6, atol=0)


def test_dropout_of_the_heads_adapter_is_applied(tmp_path):
    model = fuse(adapted(tmp_path, ["lm_head"], dropout=0.5))
    batch = packed(documents())
    model.train()
    assert not torch.equal(model.token_losses(batch), model.token_losses(batch))
    model.eval()
    assert torch.equal(model.token_losses(batch), model.token_losses(batch))
