"""Which kernel serves which site: decided before anything is changed, and written down."""

import json
from types import SimpleNamespace

import pytest
import torch
from fasttrain_kernels import native
from model.tiny_models import CONFIGS, causal_lm, language_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fasttrain.callbacks.kernel_selection import KernelSelection, select_kernels
from fasttrain.config.errors import UserError
from fasttrain.config.schema.kernels import KernelsConfig
from fasttrain.core.batch import BatchProfile
from fasttrain.core.events import Hooks
from fasttrain.core.interfaces import Topology
from fasttrain.core.kernel_plan import KernelPlan, KernelRow, KernelSite
from fasttrain.model.transforms.sites.search import SEARCHES

OPS = [search.op for search in SEARCHES]
CPU = torch.device("cpu")
PROFILE = BatchProfile(CPU, torch.float32, tokens=64, document_lengths=(10, 20))
NATIVE_REASON = native.why_not("_C_cpu")
needs_cpu_kernel = pytest.mark.skipif(NATIVE_REASON is not None, reason=f"{NATIVE_REASON}")


def skeleton(architecture="llama", **overrides):
    with torch.device("meta"):
        config = AutoConfig.for_model(architecture, **(CONFIGS[architecture] | overrides))
        return AutoModelForCausalLM.from_config(config)


def select(model, profile=PROFILE, **options):
    return select_kernels(model, profile, KernelsConfig(**options))


@needs_cpu_kernel
@pytest.mark.parametrize("make", [skeleton, causal_lm])
def test_auto_on_a_cpu(make):
    plan = select(make())
    assert {site.backend for site in plan.sites} == {"cpu"}
    assert [site.path for site in plan.sites][:2] == [
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
    ]
    row = plan.rows[0]
    assert (row.op, row.sites_matched, row.sites_found, row.chosen) == ("rms_norm", 5, 5, "cpu")
    assert row.reason == "first choice on cpu"
    assert dict(row.rejected)["triton"]


def test_eager_leaves_every_site_untouched():
    for options in ({"mode": "eager"}, dict.fromkeys(OPS, "eager")):
        plan = select(language_model(), **options)
        assert {site.backend for site in plan.sites} == {"eager"}
        assert {row.op for row in plan.rows} == set(OPS)
        assert {row.chosen for row in plan.rows} == {"eager"}


def test_a_backend_that_cannot_serve_is_an_error_by_name_only():
    with pytest.raises(UserError, match=r"^kernels\.rms_norm: .*'triton'.*can't serve") as error:
        select(skeleton(), rms_norm="triton")
    assert "\n" not in str(error.value)
    assert "triton" in dict(select(skeleton()).rows[0].rejected)


def test_strict_allows_no_fallback():
    """fp16 is nothing the CPU kernel serves."""
    profile = BatchProfile(CPU, torch.float16, tokens=64, document_lengths=())
    assert select(skeleton(), profile).rows[0].chosen == "eager"
    with pytest.raises(UserError, match="allows no fallback"):
        select(skeleton(), profile, mode="strict")


def test_the_environment_goes_first(monkeypatch):
    monkeypatch.setenv("FASTTRAIN_KERNELS", "rms_norm=eager")
    norms = [site for site in select(skeleton(), rms_norm="cpu").sites if site.op == "rms_norm"]
    assert {site.backend for site in norms} == {"eager"}
    monkeypatch.setenv("FASTTRAIN_KERNELS", "rms_norm=quick")
    with pytest.raises(UserError, match="expected one of"):
        select(skeleton())


# --- sites --------------------------------------------------------------------------------------


def test_a_model_without_sites():
    plan = select(skeleton("gpt2"))
    assert {site.op for site in plan.sites} == {"embedding"}
    assert plan.rows[0] == KernelRow("rms_norm", 0, 0, "eager", "the model has no RMS norm")
    with pytest.raises(UserError, match="'cpu' was asked for, and the model has no RMS norm"):
        select(skeleton("gpt2"), rms_norm="cpu")
    select(skeleton("gpt2"), mode="strict")


def test_look_alikes_are_rows_too():
    row = select(skeleton("cohere2")).rows[0]
    assert (row.sites_matched, row.chosen) == (0, "eager")
    assert "Cohere2LayerNorm: it computes something else than an RMS norm" in row.reason
    assert "model.layers.0.input_layernorm" in row.reason


@needs_cpu_kernel
def test_each_kind_of_site_is_decided_for_itself():
    model = nn.Sequential(nn.RMSNorm(8, eps=1e-6), nn.RMSNorm(8, eps=1e-6, dtype=torch.float16))
    plan = select(model)
    assert [(site.path, site.backend) for site in plan.sites] == [("0", "cpu"), ("1", "eager")]
    norms = [row for row in plan.rows if row.op == "rms_norm"]
    assert [(row.sites_matched, row.sites_found) for row in norms] == [(1, 2), (1, 2)]


@needs_cpu_kernel
def test_the_head_and_its_loss_are_a_site():
    model = language_model()
    plan = select(model)
    assert plan.sites[-1] == KernelSite("causal_lm.lm_head", "linear_cross_entropy", "cpu")
    row = plan.rows[-1]
    assert (row.op, row.sites_matched, row.sites_found) == ("linear_cross_entropy", 1, 1)
    assert select(model, linear_cross_entropy="eager").sites[-1].backend == "eager"
    for backend in ("triton", "cuda"):
        with pytest.raises(UserError, match=r"^kernels\.linear_cross_entropy: .*can't serve"):
            select(model, linear_cross_entropy=backend)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_head_that_is_more_than_a_linear_layer_stays_eager(kind):
    model = language_model()
    getattr(model.head.layer, f"register_{kind}_hook")(lambda *_arguments: None)
    row = select(model).rows[-1]
    assert (row.op, row.sites_matched, row.chosen) == ("linear_cross_entropy", 0, "eager")
    assert "hooks or a patch change what it computes" in row.reason
    assert "causal_lm.lm_head" in row.reason
    with pytest.raises(UserError, match=r"no output layer to fuse with the loss .*lm_head looks"):
        select(model, linear_cross_entropy="cpu")


# --- the callback -------------------------------------------------------------------------------


class Stub(SimpleNamespace):
    """As much of a run as the callback looks at."""


def run_in(directory, *, dry_run=False, rank=0, **kernels):
    return Stub(
        config=Stub(kernels=KernelsConfig(**kernels)),
        directory=directory,
        dry_run=dry_run,
        engine=Stub(topology=Topology(rank=rank, world_size=2)),
    )


def through_hooks(run, model, innermost=lambda model, profile: KernelPlan()):
    hooks = Hooks([KernelSelection()])
    hooks.bind(run)
    plan = hooks.call("select_kernels", innermost, model, PROFILE)
    hooks.emit("kernels_selected", plan)
    return plan


def test_the_decisions_are_written_down(tmp_path):
    plan = through_hooks(run_in(tmp_path), language_model())
    written = json.loads((tmp_path / "kernels.json").read_text())
    assert len(written["sites"]) == 13
    assert written["sites"][0]["path"] == "causal_lm.model.layers.0.input_layernorm"
    assert written["rows"][0]["chosen"] == plan.rows[0].chosen
    assert set(written["rows"][0]) >= {"op", "reason", "rejected", "sites_matched", "sites_found"}


@pytest.mark.parametrize("options", [{"dry_run": True}, {"rank": 1}])
def test_nothing_is_written_by_a_dry_run_or_another_rank(tmp_path, options):
    directory = tmp_path / "none"
    through_hooks(run_in(directory, **options), language_model())
    assert not directory.exists()


def test_what_a_wrapper_further_in_decided_stays(tmp_path):
    site = KernelSite("causal_lm.model.norm", "rms_norm", "mine")
    row = KernelRow("rms_norm", 1, 1, "mine", "because")
    plan = through_hooks(
        run_in(tmp_path), language_model(), lambda model, profile: KernelPlan((site,), (row,))
    )
    assert plan.sites[0] == site
    assert plan.rows[0] == row
    assert [s.path for s in plan.sites].count("causal_lm.model.norm") == 1
    assert len(plan.sites) == 13


def test_a_module_decided_for_one_op_is_open_to_another(tmp_path):
    path = "causal_lm.model.layers.0.self_attn"
    decided = KernelPlan((KernelSite(path, "rope", "mine"),))
    plan = through_hooks(run_in(tmp_path), language_model(), lambda model, profile: decided)
    backends = {site.op: site.backend for site in plan.sites if site.path == path}
    assert backends.keys() == {"rope", "packed_attention"}
    assert backends["rope"] == "mine"
