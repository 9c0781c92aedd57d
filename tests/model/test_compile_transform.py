"""Compiled layers: the same numbers, one graph for every length of batch."""

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
from torch._dynamo.utils import counters

from fasttrain.config.schema.model import (
    ActivationCheckpointConfig,
    CompileConfig,
    KernelsTransformConfig,
)
from fasttrain.core.kernel_plan import KernelPlan, KernelSite
from fasttrain.model.transforms.activation_checkpoint import ActivationCheckpointTransform
from fasttrain.model.transforms.compile import CompileTransform
from fasttrain.model.transforms.kernels import KernelsTransform
from fasttrain.model.transforms.sites.search import SEARCHES

BATCHES = [(9, 4, 13), (5,), (7, 8), (3, 3, 3, 3), (31,), (2, 19), (11, 12, 1), (6,), (8, 9), (4,)]


@pytest.fixture
def without_code_generation(request, monkeypatch):
    """Graphs as torch.compile traces them ("aot_eager": differentiates them, too), run as they are:
    generating code takes 20 seconds, and is not ours."""
    compile_ = torch.compile

    def traced(*args, mode=None, **options):
        return compile_(*args, backend=request.param, **options)

    monkeypatch.setattr(torch, "compile", traced)
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def apply(model, *, kernels=False, checkpoint=False):
    plan = KernelPlan()
    if kernels:
        sites = [site for search in SEARCHES for site in search.find(model)[0]]
        plan = KernelPlan(tuple(KernelSite(site.path, site.op, "cpu") for site in sites))
        KernelsTransform(KernelsTransformConfig()).apply(model, plan=plan)
    if checkpoint:
        ActivationCheckpointTransform(ActivationCheckpointConfig()).apply(model, plan=plan)
    return CompileTransform(CompileConfig()).apply(model, plan=plan)


def assert_as_eager(compiled, eager, lengths):
    batch = packed(documents(lengths))
    losses = [model.token_losses(batch) for model in (compiled, eager)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    assert_same_gradients(gradients(compiled), gradients(eager))


@pytest.mark.parametrize(
    ("without_code_generation", "kernels", "checkpoint"),
    [("eager", False, False), ("eager", True, False), ("aot_eager", True, True)],
    ids=["alone", "with kernels", "with kernels and checkpoints"],
    indirect=["without_code_generation"],
)
def test_one_set_of_graphs_for_all_layers_and_lengths(without_code_generation, kernels, checkpoint):
    if kernels and native.why_not("_C_cpu") is not None:
        pytest.skip(f"no CPU kernel: {native.why_not('_C_cpu')}")
    options = {"num_hidden_layers": 2}
    eager = language_model(**options)
    compiled = apply(language_model(**options), kernels=kernels, checkpoint=checkpoint)
    assert_as_eager(compiled, eager, BATCHES[0])
    assert_as_eager(compiled, eager, BATCHES[1])
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 8  # before and after attention, and once more for dynamic lengths
    for lengths in BATCHES[2:]:
        assert_as_eager(compiled, eager, lengths)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("without_code_generation", ["eager"], indirect=True)
def test_names_writing_and_generating(without_code_generation, tmp_path):
    eager, compiled = language_model(), apply(language_model())
    assert list(compiled.state_dict()) == list(eager.state_dict())
    words = tokenizer()
    answers = [m.generate(["w4 w5"], tokenizer=words, max_new_tokens=4) for m in (eager, compiled)]
    assert answers[0] == answers[1]
    compiled.save_pretrained(tmp_path, dtype=None)
    assert counters["stats"]["unique_graphs"] == 0  # generation compiles nothing
