"""Which kernel serves which site: decided before anything is changed, and written down."""

import json
from types import SimpleNamespace

import pytest
import torch
from fasttrain_kernels import native, timing
from fasttrain_kernels.registry import find
from fasttrain_kernels.selection import Choice
from fasttrain_kernels.settings import provider_names
from model.tiny_models import CONFIGS, causal_lm, language_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fasttrain.callbacks.kernel_selection import KernelSelection
from fasttrain.config.errors import UserError
from fasttrain.config.kernel_rules import backends_of, ops
from fasttrain.config.schema.kernels import OPTIMIZER_OPS, PROVIDERS, KernelsConfig
from fasttrain.core.batch import BatchProfile
from fasttrain.core.events import Callback, Hooks
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
    return KernelSelection().plan(model, profile, KernelsConfig(**options))


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
    head = plan.sites[-1]
    assert (head.path, head.op) == ("causal_lm.lm_head", "linear_cross_entropy")
    assert head.backend == "cpu" and not head.fixed
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


def run_in(directory, *, dry_run=False, rank=0, resume_from=None, **kernels):
    return Stub(
        config=Stub(kernels=KernelsConfig(**kernels)),
        directory=directory,
        dry_run=dry_run,
        resume_from=resume_from,
        engine=Stub(topology=Topology(rank=rank, world_size=2), from_rank_zero=lambda make: make()),
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
    site = KernelSite("causal_lm.model.norm", "rms_norm", "mine", "because")
    plan = through_hooks(
        run_in(tmp_path), language_model(), lambda model, profile: KernelPlan((site,))
    )
    assert plan.sites[0] == site
    assert plan.rows[0] == KernelRow("rms_norm", 1, 5, "mine", "because")
    assert [s.path for s in plan.sites].count("causal_lm.model.norm") == 1
    assert len(plan.sites) == 13


def test_a_module_decided_for_one_op_is_open_to_another(tmp_path):
    path = "causal_lm.model.layers.0.self_attn"
    decided = KernelPlan((KernelSite(path, "rope", "mine"),))
    plan = through_hooks(run_in(tmp_path), language_model(), lambda model, profile: decided)
    backends = {site.op: site.backend for site in plan.sites if site.path == path}
    assert backends.keys() == {"rope", "packed_attention"}
    assert backends["rope"] == "mine"


# --- steering -----------------------------------------------------------------------------------


def backends(plan, op):
    return {site.path: site.backend for site in plan.sites if site.op == op}


@needs_cpu_kernel
def test_globs_choose_for_the_sites_that_they_fit():
    plan = select(
        language_model(), sites={"model.layers.0.*": "eager", "*.norm": {"rms_norm": "cpu"}}
    )
    norms = backends(plan, "rms_norm")
    first = [path for path in norms if ".layers.0." in path]
    assert first and all(norms[path] == "eager" for path in first)
    assert {backend for path, backend in norms.items() if path not in first} == {"cpu"}
    assert set(backends(plan, "embedding").values()) == {"cpu"}
    rows = {(row.chosen, row.sites_matched): row for row in plan.rows if row.op == "rms_norm"}
    assert rows["eager", 2].reason == "asked for by kernels.sites 'model.layers.0.*'"
    assert rows["cpu", 1].reason == "asked for by kernels.sites '*.norm'"
    assert rows["cpu", 2].reason == "first choice on cpu"
    fixed = {site.path for site in plan.sites if site.fixed}
    assert fixed == {site.path for site in plan.sites if ".layers.0." in site.path} | {
        "causal_lm.model.norm"
    }


def test_globs_that_contradict_each_other_are_refused():
    both = {"*.layers.0.*": "eager", "*.input_layernorm": {"rms_norm": "cpu"}}
    with pytest.raises(
        UserError, match=r"^kernels\.sites: .*layers\.0.* and .*both fit .*rms_norm"
    ):
        select(language_model(), sites=both)
    agreeing = {"*.layers.0.*": "eager", "*.input_layernorm": {"rms_norm": "eager"}}
    assert backends(select(language_model(), sites=agreeing), "rms_norm")


def test_a_glob_that_fits_nothing_is_refused():
    with pytest.raises(UserError, match=r"'\*\.layer\.7\.\*' fits no site in this model"):
        select(language_model(), sites={"*.layer.7.*": "eager"})
    with pytest.raises(UserError, match=r"'\*\.mlp' fits no site of rope"):
        select(language_model(), sites={"*.mlp": {"swiglu": "eager", "rope": "eager"}})


@needs_cpu_kernel
def test_a_callback_can_veto_one_op_on_one_layer(tmp_path):
    class Veto(Callback):
        def wrap_select_kernels(self, run, call, model, profile):
            return call(model, profile).leaving("swiglu", "*.layers.1.mlp", "I distrust it here")

    hooks = Hooks([Veto(), KernelSelection()])
    hooks.bind(run_in(tmp_path))
    model = language_model()
    plan = hooks.call("select_kernels", lambda model, profile: KernelPlan(), model, PROFILE)
    path = "causal_lm.model.layers.{}.mlp"
    assert backends(plan, "swiglu") == {path.format(0): "cpu", path.format(1): "eager"}
    rows = {row.chosen: row for row in plan.rows if row.op == "swiglu"}
    assert (rows["eager"].sites_matched, rows["eager"].sites_found) == (1, 2)
    assert rows["eager"].reason == "I distrust it here"
    assert rows["cpu"].sites_matched == 1
    with pytest.raises(ValueError, match="no site of rope fits"):
        plan.leaving("rope", "nowhere", "because")


@needs_cpu_kernel
def test_a_subclass_can_choose_for_each_site():
    class Mine(KernelSelection):
        def choose(self, site, asked, source, profile, config):
            if site.path.endswith("q_proj") or site.op == "rope":
                return Choice(site.op, "eager", "mine")
            return super().choose(site, asked, source, profile, config)

    plan = Mine().plan(language_model(), PROFILE, KernelsConfig())
    assert set(backends(plan, "rope").values()) == {"eager"}
    assert set(backends(plan, "swiglu").values()) == {"cpu"}


@needs_cpu_kernel
def test_a_resumed_run_goes_on_with_what_served_it(tmp_path):
    through_hooks(run_in(tmp_path, rms_norm="eager"), language_model())
    checkpoint = tmp_path / "checkpoints" / "step-00000003"
    plan = through_hooks(run_in(tmp_path, resume_from=checkpoint), language_model())
    assert set(backends(plan, "rms_norm").values()) == {"eager"}
    assert plan.rows[0].reason == "as before the run was resumed"
    assert not any(site.fixed for site in plan.sites)
    # What is asked for now goes before what was.
    plan = through_hooks(run_in(tmp_path, resume_from=checkpoint, rms_norm="cpu"), language_model())
    assert set(backends(plan, "rms_norm").values()) == {"cpu"}
    (tmp_path / "kernels.json").write_text('{"sites": [{"op": "rms_norm"')
    plan = through_hooks(run_in(tmp_path, resume_from=checkpoint), language_model())
    assert plan.rows[0].reason == "first choice on cpu"


@needs_cpu_kernel
def test_all_ranks_take_what_rank_0_decides(tmp_path):
    model = language_model()
    run = run_in(tmp_path, rank=1)
    theirs = KernelPlan((KernelSite("causal_lm.model.norm", "rms_norm", "eager"),))
    run.engine.from_rank_zero = lambda make: theirs
    hooks = Hooks([KernelSelection()])
    hooks.bind(run)
    plan = hooks.call("select_kernels", lambda model, profile: KernelPlan(), model, PROFILE)
    assert plan is theirs


@needs_cpu_kernel
def test_full_autotuning_times_the_sites_on_the_runs_sizes(own_cache, monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.01)
    profile = BatchProfile(CPU, torch.float32, tokens=64, document_lengths=(10, 20, 30, 40))
    full = KernelsConfig(autotune="full", providers="none")  # none that compiles for long
    plan = KernelSelection().plan(language_model(), profile, full)
    assert all(
        row.milliseconds and row.eager_milliseconds for row in plan.rows if row.sites_matched
    )
    again = KernelSelection().plan(language_model(), profile, KernelsConfig(providers="none"))
    assert again == plan
    untimed = KernelSelection().plan(language_model(), profile, KernelsConfig(autotune="off"))
    assert not any(row.milliseconds for row in untimed.rows)


def test_only_kernels_that_repeat_their_bits_and_only_allowed_providers():
    profile = BatchProfile(CPU, torch.float16, tokens=64, document_lengths=())
    plan = select(language_model(), profile, providers="none")
    row = next(row for row in plan.rows if row.op == "packed_attention")
    assert dict(row.rejected)["sdpa"] == "left out: not among the providers allowed"
    with pytest.raises(UserError, match="leaves sdpa out"):
        select(language_model(), providers=("flex",), packed_attention="sdpa")


def test_the_config_names_the_ops_and_backends_that_there_are():
    """Its names are written down a second time, since reading a config loads no torch."""
    for op in ops():
        assert set(backends_of(op)) == {"auto", *(c.name for c in find(op).candidates)}
    assert set(PROVIDERS) == set(provider_names())
    assert set(ops()) == {*OPS, *OPTIMIZER_OPS}
