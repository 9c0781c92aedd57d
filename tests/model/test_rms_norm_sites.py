"""RMS norms are found by structure and accepted by what they compute."""

import functools

import pytest
import torch
from fasttrain_kernels.ops.rms_norm import reference
from model.tiny_models import CONFIGS
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fasttrain.model.transforms.sites.rms_norm import find_rms_norms

# How many each tiny two-layer model has, and their style.
EXPECTED = {
    "llama": (5, "llama"),
    "qwen3": (9, "llama"),
    "gemma2": (9, "gemma"),
    "gemma3_text": (13, "gemma"),
    "olmo2": (9, "olmo2"),
    "phi3": (5, "llama"),
    "mixtral": (5, "llama"),
    "mamba": (3, "llama"),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("architecture", EXPECTED)
def test_architectures(architecture, device):
    config = AutoConfig.for_model(architecture, **CONFIGS[architecture])
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
    sites, others = find_rms_norms(model)
    count, style = EXPECTED[architecture]
    assert [site.style for site in sites] == [style] * count
    assert others == []
    for site in sites:
        module = model.get_submodule(site.path)
        assert module.weight.shape == (site.width,)
        assert site.weight_dtype == torch.float32


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "bloom", "phi"])
def test_layer_norms_with_a_bias_are_no_candidates(architecture):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(architecture, **CONFIGS[architecture])
        )
    assert find_rms_norms(model) == ([], [])


class Norm(nn.Module):
    """A user's own RMS norm, written as one would."""

    def __init__(self, width=8):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = 1e-5

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Gated(Norm):
    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * gate)


class EpsilonOutside(Norm):
    def forward(self, x):
        return self.weight * (x / (x.float().square().mean(-1, keepdim=True).sqrt() + self.eps))


class OtherEpsilon(Norm):
    def forward(self, x):
        self.eps, kept = self.eps * 2, self.eps
        out = super().forward(x)
        self.eps = kept
        return out


class Clipped(Norm):
    def forward(self, x):
        return super().forward(x).clamp(-2, 2)


def test_a_module_of_ones_own():
    sites, others = find_rms_norms(nn.Sequential(nn.Linear(8, 8), Norm()))
    assert others == []
    [site] = sites
    assert (site.path, site.width, site.eps, site.style) == ("1", 8, 1e-5, "llama")


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Gated(), "Gated: it takes x, gate"),
        (EpsilonOutside(), "EpsilonOutside: it computes something else"),
        (OtherEpsilon(), "OtherEpsilon: it computes something else"),
        (Clipped(), "Clipped: it computes something else"),
        (nn.LayerNorm(8, bias=False), "LayerNorm: it computes something else"),
        (nn.RMSNorm(8), "RMSNorm: its epsilon depends on the dtype"),
    ],
)
def test_what_only_looks_like_one_is_reported(module, reason):
    sites, others = find_rms_norms(nn.Sequential(module))
    assert sites == []
    [other] = others
    assert other.path == "0"
    assert other.reason.startswith(reason)


def test_a_norm_that_is_wrapped_is_reported():
    """As accelerate's hooks do."""
    norm = Norm()
    norm.forward = functools.partial(Norm.forward, norm)
    sites, [other] = find_rms_norms(nn.Sequential(norm))
    assert sites == [] and other.reason == "Norm: its forward has been patched"


def test_torch_has_one_of_its_own():
    [site], others = find_rms_norms(nn.Sequential(nn.RMSNorm(8, eps=1e-6)))
    assert others == []
    assert site.style in reference.STYLES


def test_looking_changes_nothing():
    model = nn.Sequential(Norm())
    model[0].weight.data.fill_(3.0)
    find_rms_norms(model)
    assert model[0].weight.tolist() == [3.0] * 8
    assert model[0].weight.grad is None
