"""bench/ops: that every way to compute a case computes the same, and that cases are as they say."""

import pytest
import torch
import torch.nn.functional as F

from bench.harness import Absent
from bench.ops import bench_cross_entropy as rows_bench
from bench.ops import bench_linear_cross_entropy as head_bench
from bench.ops import bench_linear_log_probs as log_probs_bench
from bench.ops import heads
from bench.ops.heads import Problem, Shape

F32, BF16 = torch.float32, torch.bfloat16
ON_A_CPU = {"fasttrain", "eager", "F.linear_cross_entropy", "F.linear_cross_entropy chunked"}
SMALL = {
    "all rows": Shape(48, 16, 600, F32),
    "ignored": Shape(40, 16, 600, F32, ignored=0.4),
    "softcap": Shape(40, 16, 96, F32, ignored=0.25, softcap=2.0),
}


def results(providers):
    """What each gives that runs here, but torch.compile, which takes its time."""
    found = {}
    for provider in providers:
        if provider.name == "torch.compile":
            continue
        try:
            found[provider.name] = provider.build()()
        except Absent as reason:
            assert str(reason)
    return found


@pytest.mark.parametrize("rows_given", [True, False])
@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
def test_heads_agree(shape, rows_given):
    problem = Problem(shape, "cpu")
    found = results(head_bench.providers(problem, rows_given, "cpu"))
    expected = ON_A_CPU if rows_given and shape.softcap is None else {"fasttrain", "eager"}
    assert set(found) == expected
    for name, result in found.items():
        errors = problem.exact.errors(result)
        assert max(errors.values()) < 1e-5, (name, errors)
        assert result[1].shape == problem.hidden.shape


@pytest.mark.parametrize("backward", [False, True])
def test_log_probs_agree(backward):
    found = results(
        log_probs_bench.providers(Problem(SMALL["softcap"], "cpu"), backward, device="cpu")
    )
    assert set(found) == {"fasttrain", "eager"}
    for ours, other in zip(found["fasttrain"], found["eager"], strict=True):
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rows_agree(dtype):
    logits, labels = torch.randn(70, 300).to(dtype), torch.randint(300, (70,))
    errors = rows_bench.errors_of(logits, labels)
    found = results(rows_bench.providers(logits.requires_grad_(), labels, "cpu"))
    assert set(found) == {"fasttrain", "eager", "fasttrain in place", "fasttrain one pass"}
    assert found.pop("fasttrain one pass") is None
    for name, result in found.items():
        values = errors(result)
        assert max(values.values()) < (1e-5 if dtype == F32 else 1e-2), (name, values)


@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
def test_the_exact_gradient_is_autograd_s(shape):
    problem = Problem(shape, "cpu")
    hidden, weight = (
        t.detach().double().requires_grad_() for t in (problem.hidden, problem.weight)
    )
    loss = F.cross_entropy(heads.logits_of(hidden, weight, shape.softcap), problem.labels)
    (dweight,) = torch.autograd.grad(loss, weight)
    exact = problem.exact
    torch.testing.assert_close(exact.loss, loss.detach())
    torch.testing.assert_close(exact.dweight, dweight[exact.classes])
    assert len(exact.classes) > 60


def test_a_problem_ignores_what_it_says():
    problem = Problem(Shape(50, 8, 20, F32, ignored=0.4), "cpu")
    counts = (problem.labels != heads.IGNORE_INDEX).nonzero()[:, 0]
    assert torch.equal(counts, problem.rows) and len(counts) == problem.shape.counting == 30


def test_cases():
    found = [head_bench.name_of(*case) for case in head_bench.cases("cpu")]
    assert len(found) == len(set(found)) == 9
    assert found[1] == "2048x512x32000 float32 40% ignored"
    assert len(head_bench.cases("cuda")) == 9


def test_what_an_h200_should_take():
    shape = Shape(8192, 4096, 128256, BF16)
    products = 6 * 8192 * 4096 * 128256 / 790e12
    logits = 8192 * 128256 * 4 / 4.3e12
    weight, hidden = 128256 * 4096, 8192 * 4096  # elements, whose gradients are scaled
    scaling = (weight + hidden) * 4 / 4.3e12
    assert heads.h200_seconds(shape) == pytest.approx(products + logits + scaling)
    twice = Shape(16384, 4096, 128256, BF16)  # two chunks: dweight is added up in float32
    summing = weight * (8 + 6) / 4.3e12  # read and written once more, then rounded
    scaling = (weight + 2 * hidden) * 4 / 4.3e12
    expected = 2 * (products + logits) + summing + scaling
    assert heads.h200_seconds(twice) == pytest.approx(expected)
    assert heads.h200_seconds(Shape(8192, 4096, 128256, F32)) is None


def test_minutes_are_spared_on_a_cpu():
    many = Shape(2048, 512, 128256, BF16)
    assert head_bench.why_left_out("eager", many, "cpu")
    assert head_bench.why_left_out("eager", many, "cuda") is None
    assert head_bench.why_left_out("eager", Shape(2048, 512, 32000, BF16), "cpu") is None
