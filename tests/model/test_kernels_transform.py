"""Kernels are put into module instances, compute what was there before, and come out again."""

import copy

import pytest
import torch
from fasttrain_kernels import native
from model.tiny_models import (
    assert_same_gradients,
    documents,
    gradients,
    language_model,
    packed,
    tokenizer,
)

from fasttrain.config.schema.model import KernelsTransformConfig
from fasttrain.core.kernel_plan import KernelPlan, KernelSite
from fasttrain.model.transforms.kernels import KernelsTransform, revert
from fasttrain.model.transforms.sites import find_rms_norms

needs_cpu_kernel = pytest.mark.skipif(
    native.why_not("_C_cpu") is not None, reason=f"no CPU kernel: {native.why_not('_C_cpu')}"
)


def plan_for(model, backend="cpu"):
    sites, _ = find_rms_norms(model)
    return KernelPlan(tuple(KernelSite(site.path, "rms_norm", backend) for site in sites))


def apply(model, plan):
    return KernelsTransform(KernelsTransformConfig()).apply(model, plan=plan)


def patched(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def loss_and_gradients(model, **options):
    model.zero_grad()
    loss = model.token_losses(packed(documents()), **options)
    loss.backward()
    return loss.detach(), {name: g.clone() for name, g in gradients(model).items()}


@needs_cpu_kernel
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3_text", "olmo2", "qwen3"])
def test_the_model_computes_what_it_did(architecture):
    model = language_model(architecture)
    loss, before = loss_and_gradients(model)
    plan = plan_for(model)
    assert apply(model, plan) is model
    assert patched(model) == [site.path for site in plan.sites]
    loss_with, after = loss_and_gradients(model)
    torch.testing.assert_close(loss_with, loss, rtol=1e-6, atol=0)
    assert_same_gradients(after, before)


@needs_cpu_kernel
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_under_bf16_autocast(architecture):
    model = language_model(architecture)
    with torch.autocast("cpu", torch.bfloat16):
        loss, before = loss_and_gradients(model)
        loss_with, after = loss_and_gradients(apply(model, plan_for(model)))
    # Rows are bf16 (8 bits) here and there; the same roundings fall otherwise.
    torch.testing.assert_close(loss_with, loss, rtol=1e-2, atol=0)
    assert_same_gradients(after, before, rtol=5e-2, floor=1e-1)


@needs_cpu_kernel
def test_reverting_gives_the_model_back():
    model = language_model()
    loss, before = loss_and_gradients(model)
    apply(model, plan_for(model))
    revert(model)
    assert patched(model) == []
    loss_again, after = loss_and_gradients(model)
    assert torch.equal(loss_again, loss)
    assert all(torch.equal(after[name], before[name]) for name in before)


@needs_cpu_kernel
def test_another_model_in_the_process_is_not_touched():
    model, other = language_model(), language_model()
    apply(model, plan_for(model))
    assert patched(other) == []
    norm = type(other.causal_lm.model.norm)
    assert norm.forward.__module__.startswith("transformers")


@needs_cpu_kernel
def test_a_copy_runs_on_its_own_weights():
    model = apply(language_model(), plan_for(language_model()))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.causal_lm.model.norm.weight.mul_(3)
    batch = packed(documents())
    assert not torch.equal(twin.token_losses(batch), model.token_losses(batch))
    revert(twin)
    assert patched(twin) == []
    assert patched(model) != []


@needs_cpu_kernel
def test_generating_and_writing_with_kernels(tmp_path):
    model = language_model()
    words = tokenizer()
    before = model.generate(["w5 w9"], tokenizer=words, max_new_tokens=5)
    apply(model, plan_for(model))
    assert model.generate(["w5 w9"], tokenizer=words, max_new_tokens=5) == before
    model.save_pretrained(tmp_path, dtype=None)
    assert (tmp_path / "model.safetensors").is_file()


def test_eager_sites_and_empty_plans_leave_everything_alone():
    model = language_model()
    apply(model, KernelPlan())
    apply(model, plan_for(model, "eager"))
    assert patched(model) == []


def test_a_plan_for_a_site_that_is_not_there_is_a_bug_of_ours():
    with pytest.raises(AssertionError, match="is not in the model"):
        apply(language_model(), KernelPlan((KernelSite("nowhere", "rms_norm", "cpu"),)))
