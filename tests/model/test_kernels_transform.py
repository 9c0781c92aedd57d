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
from fasttrain.model.packed_attention import BACKEND
from fasttrain.model.transforms.kernels import KernelsTransform, revert
from fasttrain.model.transforms.sites.search import SEARCHES

needs_cpu_kernel = pytest.mark.skipif(
    native.why_not("_C_cpu") is not None, reason=f"no CPU kernel: {native.why_not('_C_cpu')}"
)


def plan_for(model, backend="cpu", ops=None):
    """Every site of `ops`, by default of all."""
    sites = [site for search in SEARCHES for site in search.find(model)[0]]
    chosen = [site for site in sites if ops is None or site.op in ops]
    return KernelPlan(tuple(KernelSite(site.path, site.op, backend) for site in chosen))


def apply(model, plan):
    return KernelsTransform(KernelsTransformConfig()).apply(model, plan=plan)


def patched(model):
    """Modules that are not as their class has them."""
    changed = ("forward", BACKEND)
    return {name for name, m in model.named_modules() if any(key in vars(m) for key in changed)}


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
    paths = {site.path for site in plan.sites if site.op != "linear_cross_entropy"}
    assert patched(model) == {*paths, "causal_lm.model.rotary_emb"}
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
    assert patched(model) == set()
    loss_again, after = loss_and_gradients(model)
    assert torch.equal(loss_again, loss)
    assert all(torch.equal(after[name], before[name]) for name in before)


@needs_cpu_kernel
def test_another_model_in_the_process_is_not_touched():
    model, other = language_model(), language_model()
    apply(model, plan_for(model))
    assert patched(other) == set()
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
    assert patched(twin) == set()
    assert patched(model) != set()


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
    assert patched(model) == set()


@needs_cpu_kernel
def test_one_op_at_a_time():
    model = language_model()
    apply(model, plan_for(model, ops={"swiglu"}))
    assert patched(model) == {f"causal_lm.model.layers.{i}.mlp" for i in (0, 1)}
    assert model.loss_backend is None


def test_a_plan_for_a_site_that_is_not_there_is_a_bug_of_ours():
    with pytest.raises(AssertionError, match="is not in the model"):
        apply(language_model(), KernelPlan((KernelSite("nowhere", "rms_norm", "cpu"),)))
