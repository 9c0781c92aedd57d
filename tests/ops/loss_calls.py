"""Calls of the ops that make losses: inputs, comparisons with exact values, and of bits."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels import cross_entropy, dispatch, linear_cross_entropy, native
from fasttrain_kernels.testing_losses import (
    cross_entropy_expected,
    linear_cross_entropy_expected,
)
from ops.rms_norm_calls import BF16, CPU, F32, F64, same_bits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["BF16", "CPU", "F32", "F64", "same_bits"]

IGNORED = -100
RANK = 3

# What calls say beside their tensors. `token_weights` stands for weights made to the labels' shape.
OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param({"reduction": "sum"}, id="sum"),
    pytest.param({"reduction": "none", "token_weights": True}, id="none-weighted"),
    pytest.param({"num_items": 37, "scale": 0.3}, id="num_items-scale"),
    pytest.param({"num_items": torch.tensor([11.0]), "softcap": 2.0}, id="num_items-softcap"),
    pytest.param({"label_smoothing": 0.1, "ignore_index": 0}, id="smoothing-ignoring-class-0"),
    pytest.param({"z_loss": 0.01, "ignore_index": 1_000_000}, id="z_loss-ignoring-a-million"),
    pytest.param(
        {
            "reduction": "none",
            "label_smoothing": 0.2,
            "z_loss": 0.1,
            "softcap": 5.0,
            "scale": -1.7,
            "token_weights": True,
        },
        id="everything",
    ),
]


def kernel_of(op, backend):
    """The module that implements a backend."""
    return dispatch.OPS[op].candidate(backend).load()


def labels_of(shape, classes, ignore_index=IGNORED, device="cpu", seed=0):
    """Labels of which about a third are ignored."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, shape, generator=generator)
    ignored = torch.rand(shape, generator=generator) < 1 / 3
    return labels.masked_fill(ignored, ignore_index).to(device)


def logits_of(shape, dtype=F32, device="cpu", seed=0, size=3.0):
    """Logits that want a gradient."""
    generator = torch.Generator().manual_seed(seed)
    logits = size * torch.randn(shape, generator=generator)
    return logits.to(device, dtype).requires_grad_()


def filled_in(options, labels, seed=2):
    """Options with token weights, of both signs and with a zero, where they ask for some."""
    if "token_weights" not in options:
        return options
    weights = torch.randn(labels.shape, generator=torch.Generator().manual_seed(seed))
    weights.reshape(-1)[:1] = 0
    return options | {"token_weights": weights.to(labels.device)}


@dataclass
class Heads:
    """The tensors of a head: hidden (..., H), weight (V, H), and what may be added."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    inner: Tensor | None = None
    outer: Tensor | None = None

    def named(self):
        return {name: t for name, t in vars(self).items() if t is not None}

    def leaves(self):
        return tuple(self.named().values())

    def gradients(self):
        return {name: leaf.grad for name, leaf in self.named().items()}

    def added(self):
        """The optional ones as arguments."""
        adapter = None if self.inner is None else (self.inner, self.outer)
        return {"bias": self.bias, "adapter": adapter}

    def copy(self):
        """Leaves of their own, with the same values."""
        fresh = {n: t.detach().clone().requires_grad_() for n, t in self.named().items()}
        return Heads(**fresh)


def head_of(shape, width, classes, dtype=F32, added=False, device="cpu", seed=0):
    """Leaves that want gradients, of a size that makes logits spread by about 3."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape, size=1.0):
        drawn = size * torch.randn(shape, generator=generator)
        return drawn.to(device, dtype).requires_grad_()

    tensors = [leaf(*shape, width), leaf(classes, width, size=3 * width**-0.5)]
    if added:
        tensors += [leaf(classes), leaf(*shape, RANK), leaf(classes, RANK)]
    return Heads(*tensors)


def loss_of(place, head, labels, **options):
    """linear_cross_entropy of a head on a place."""
    return linear_cross_entropy(
        head.hidden, head.weight, labels, backend=place.backend, **head.added(), **options
    )


def torchs_own(logits, labels, options):
    """The definition in torch's own functions: loss, log-probabilities, entropy."""
    z = options.get("scale", 1.0) * logits
    if "softcap" in options:
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    ignore_index = options.get("ignore_index", IGNORED)
    common = {"reduction": "none", "ignore_index": ignore_index}
    losses = F.cross_entropy(z, labels, label_smoothing=options.get("label_smoothing", 0), **common)
    counts = labels != ignore_index
    losses = losses + options.get("z_loss", 0) * z.logsumexp(1).square() * counts
    losses = losses * options.get("token_weights", 1.0)
    distribution = torch.distributions.Categorical(logits=z)
    found = {
        "log_probs": -F.cross_entropy(z, labels, **common),
        "entropy": distribution.entropy() * counts,
    }
    reduction = options.get("reduction", "mean")
    if reduction == "mean":
        losses = losses.sum() / float(options.get("num_items", counts.sum()))
    return found | {"loss": losses.sum() if reduction == "sum" else losses}


def upstream(loss, seed=1):
    """A gradient of the loss: any numbers, not 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(loss.shape, generator=generator).to(loss)


def assert_within(expected, found):
    """Each of the tensors found is as near its exact value as roundings allow."""
    for name, tensor in found.items():
        ratio = expected[name].ratio(tensor)
        assert ratio <= 1, f"{name} is {ratio:.3g} times as far off as is allowed"


def assert_exact(place, logits, labels, **options):
    """cross_entropy, forward and backward, is within what its roundings allow."""
    options = filled_in(options, labels)
    out = cross_entropy(
        logits,
        labels,
        backend=place.backend,
        return_log_probs=True,
        return_entropy=True,
        **options,
    )
    dloss = upstream(out.loss)
    out.loss.backward(dloss)
    assert logits.grad.dtype == logits.dtype
    assert out.loss.dtype == (F64 if logits.dtype == F64 else F32)
    assert out.log_probs.dtype == out.entropy.dtype == out.loss.dtype
    assert not (out.log_probs.requires_grad or out.entropy.requires_grad)
    expected = cross_entropy_expected(logits, labels, dloss, truncating=place.truncating, **options)
    assert_within(expected, {**out._asdict(), "dlogits": logits.grad})


def product_dtype(place, dtype):
    """Of the operands that a backend multiplies."""
    narrow = place.backend in ("triton", "cuda") and dtype != F64
    return dtype if narrow else F64 if dtype == F64 else F32


def head_expected(place, head, labels, dloss, **options):
    """The exact values of linear_cross_entropy, and the limits of the place's backend."""
    return linear_cross_entropy_expected(
        head.hidden,
        head.weight,
        labels,
        dloss,
        **head.added(),
        product_dtype=product_dtype(place, head.hidden.dtype),
        truncating=place.truncating,
        **options,
    )


def assert_head_exact(place, head, labels, *, rows=None, recompute=None, **options):
    """linear_cross_entropy, forward and backward, is within what its roundings allow."""
    options = filled_in(options, labels)
    head = head.copy()
    out = loss_of(
        place,
        head,
        labels,
        rows=rows,
        recompute=recompute,
        return_log_probs=True,
        return_entropy=True,
        **options,
    )
    dloss = upstream(out.loss)
    out.loss.backward(dloss)
    for leaf in head.leaves():
        assert leaf.grad.dtype == leaf.dtype and leaf.grad.shape == leaf.shape
    assert out.loss.dtype == (F64 if head.hidden.dtype == F64 else F32)
    assert not (out.log_probs.requires_grad or out.entropy.requires_grad)
    expected = head_expected(place, head, labels, dloss, **options)
    gradients = {f"d{name}": gradient for name, gradient in head.gradients().items()}
    assert_within(expected, {**out._asdict(), **gradients})
    ignored = labels == options.get("ignore_index", IGNORED)
    for name in ("hidden", "inner") if head.inner is not None else ("hidden",):
        assert not head.gradients()[name][ignored].any()


def head_call(place, head, labels, **options):
    """The loss and all gradients of one call, for comparisons of bits."""
    head = head.copy()
    loss = loss_of(place, head, labels, **options)
    loss.backward(upstream(loss))
    return [loss.detach(), *head.gradients().values()]


def logits_call(place, logits, labels, **options):
    """The loss and the gradient of one call, for comparisons of bits."""
    logits = logits.detach().clone().requires_grad_()
    loss = cross_entropy(logits, labels, backend=place.backend, **options)
    loss.backward(upstream(loss))
    return [loss.detach(), logits.grad]


class Calls(TorchDispatchMode):
    """Remembers what fasttrain's opaque ops are called with."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fasttrain":
            named = zip((a.name for a in func._schema.arguments), args, strict=False)
            self.seen.append((func._schema.name.removeprefix("fasttrain::"), dict(named)))
        return func(*args, **(kwargs or {}))


def use_instruction_set(name):
    """Selects one for the C++ kernels; skips the test where this CPU lacks it."""
    assert native.why_not("_C_cpu") is None
    try:
        torch.ops.fasttrain_native.set_cpu_isa(name)
    except RuntimeError:
        pytest.skip(f"this CPU has no {name}")
