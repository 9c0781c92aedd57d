"""Every architecture that is promised, tiny and random, with all kernels on: the sites that are
found, and the numbers, held against transformers' eager model on one document at a time."""

import copy
from collections import Counter

import pytest
import torch
from fasttrain_kernels import native
from model.tiny_models import (
    assert_same_gradients,
    causal_lm,
    documents,
    eager_copy,
    gradients,
    language_model,
    losses_alone,
    packed,
)

from fasttrain.callbacks.kernel_selection import KernelSelection
from fasttrain.config.schema.kernels import KernelsConfig
from fasttrain.config.schema.model import KernelsTransformConfig, RandomModelConfig
from fasttrain.core.batch import BatchProfile
from fasttrain.model.hf import as_language_model
from fasttrain.model.transforms.kernels import KernelsTransform, revert

NATIVE_REASON = native.why_not("_C_cpu")
pytestmark = pytest.mark.skipif(NATIVE_REASON is not None, reason=f"{NATIVE_REASON}")

# Sites in two layers: norms, rotations, gated units of silu, of gelu. Attention has two, the
# embedding and the head one each.
SITES = {
    "llama": (5, 2, 2, 0),
    "mistral": (5, 2, 2, 0),
    "qwen2": (5, 2, 2, 0),
    "qwen3": (9, 2, 2, 0),
    "gemma2": (9, 2, 0, 2),
    "gemma3_text": (13, 2, 0, 2),
    "phi3": (5, 2, 2, 0),
    "smollm3": (5, 2, 2, 0),
    "olmo2": (9, 2, 2, 0),
    "granite": (5, 2, 2, 0),
    "cohere2": (0, 2, 2, 0),  # its norms are LayerNorms
    "mixtral": (5, 2, 0, 0),  # its MLPs are experts, in one tensor for all
    "qwen3_moe": (9, 2, 1, 0),  # one dense layer, one of experts
}
DENSE_FIRST = {"qwen3_moe": {"mlp_only_layers": [0]}}


def profile(dtype):
    return BatchProfile(torch.device("cpu"), dtype, tokens=64, document_lengths=(9, 4, 13))


def with_kernels(model, dtype=torch.float32):
    """All kernels on; whatever would fall back is an error."""
    plan = KernelSelection().plan(model, profile(dtype), KernelsConfig(mode="strict"))
    KernelsTransform(KernelsTransformConfig()).apply(model, plan=plan)
    return plan


@pytest.mark.parametrize("architecture", SITES)
def test_every_site_is_found(architecture):
    model = language_model(architecture, **DENSE_FIRST.get(architecture, {}))
    plan = with_kernels(model)
    found = Counter(site.op for site in plan.sites)  # of which a row may have a part
    norms, rotations, silu, gelu = SITES[architecture]
    expected = {"rms_norm": norms, "rope": rotations, "swiglu": silu, "geglu": gelu}
    expected |= {"packed_attention": 2, "embedding": 1, "linear_cross_entropy": 1}
    assert found == {op: count for op, count in expected.items() if count}
    assert {site.backend for site in plan.sites} == {"cpu"}
    left_alone = {row.op for row in plan.rows if "left alone" in row.reason}
    assert left_alone == ({"rms_norm"} if architecture == "cohere2" else set())


@pytest.mark.parametrize("attention", ["per_document", "padded"])
@pytest.mark.parametrize("architecture", SITES)
def test_float32_is_what_transformers_computes_on_separate_documents(architecture, attention):
    overrides = DENSE_FIRST.get(architecture, {})
    model = language_model(architecture, attention=attention, **overrides)
    theirs = eager_copy(causal_lm(architecture, **overrides))
    docs = documents()
    with_kernels(model)

    logits = model.logits(packed(docs))
    expected = torch.cat([theirs(input_ids=torch.tensor([ids])).logits[0] for ids, _ in docs])
    assert (logits - expected).norm() <= 1e-4 * expected.norm()

    loss, reference = model.token_losses(packed(docs)), losses_alone(theirs, docs)
    torch.testing.assert_close(loss, reference, rtol=1e-4, atol=0)
    loss.backward()
    reference.backward()
    assert_same_gradients(gradients(model.causal_lm), gradients(theirs), rtol=1e-4)


def bfloat16_outcome(model, docs):
    """Logits and gradients of transformers' model on separate documents."""
    logits = torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids, _ in docs])
    losses_alone(model, docs).backward()
    return logits.detach(), gradients(model)


def distances(outcome, exact):
    """Norm-wise distance of logits and of each gradient from the exact ones; a tensor that hardly
    has a gradient is measured by the whole."""
    (logits, found), (exact_logits, expected) = outcome, exact
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    errors = {"logits": (logits.double() - exact_logits).norm() / exact_logits.norm()}
    for name, gradient in expected.items():
        scale = torch.maximum(gradient.norm(), 1e-2 * whole)
        errors[name] = (found[name].double() - gradient).norm() / scale
    return {name: float(error) for name, error in errors.items()}


@pytest.mark.parametrize("attention", ["per_document", "padded"])
@pytest.mark.parametrize("architecture", SITES)
def test_bfloat16_is_as_good_as_eager(architecture, attention):
    """At most twice as far from float64 as transformers' eager model is."""
    weights = causal_lm(architecture, **DENSE_FIRST.get(architecture, {})).bfloat16()
    docs = documents((25, 4, 31, 1, 18))  # of few tokens, the distance of a norm's weight is chance
    wide = eager_copy(weights).double()
    wide.set_experts_implementation("eager")  # the default one multiplies no float64
    exact = bfloat16_outcome(wide, docs)
    eager = distances(bfloat16_outcome(eager_copy(weights), docs), exact)

    ours = as_language_model(copy.deepcopy(weights), RandomModelConfig(attention=attention))
    with_kernels(ours, torch.bfloat16)
    logits = ours.logits(packed(docs)).detach()
    ours.token_losses(packed(docs)).backward()
    for name, error in distances((logits, gradients(ours.causal_lm)), exact).items():
        assert error <= 2 * eager[name], (name, error, eager[name])


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "cohere2", "phi3"])
def test_a_changed_neighbour_changes_no_bit(architecture):
    model = language_model(architecture)
    with_kernels(model)
    docs = documents()
    changed = [*docs[:2], documents(seed=7)[2], *docs[3:]]
    begin, end = sum(len(ids) for ids, _ in docs[:2]), sum(len(ids) for ids, _ in docs[:3])
    before, after = model.logits(packed(docs)), model.logits(packed(changed))
    assert torch.equal(before[:begin], after[:begin])
    assert torch.equal(before[end:], after[end:])
    assert not torch.equal(before[begin:end], after[begin:end])


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "phi3", "smollm3"])
def test_kernels_come_out_again(architecture):
    model = language_model(architecture)
    batch = packed(documents())
    before = model.logits(batch)
    with_kernels(model)
    revert(model)
    assert torch.equal(model.logits(batch), before)
    assert [m for m in model.modules() if "forward" in vars(m)] == []
