"""bench/ops/bench_packed_attention.py: every way computes the same, and cases are as they say."""

import pytest
import torch

from bench.harness import Absent
from bench.ops import bench_packed_attention as bench
from bench.ops.bench_packed_attention import BF16, F32, MIXED, Shape

ON_A_CPU = {
    "fasttrain",
    "fasttrain cpu",
    "SDPA masked",
    "SDPA per document",
    "SDPA padded",
    "through fasttrain: sdpa",
}


@pytest.mark.parametrize("document", [8, MIXED], ids=["even", "mix"])
def test_ways_agree(document):
    shape, found = Shape(400, 4, 2, 16, F32, document), {}
    for name, make in bench.providers_of("cpu").items():
        try:
            o = bench.steps(make, shape, backward=False, device="cpu")()
            found[name] = (o, *bench.steps(make, shape, backward=True, device="cpu")())
        except Absent as reason:
            assert "can't serve this call" in str(reason)
    assert set(found) == ON_A_CPU
    for result in found.values():
        for one, other in zip(result, found["SDPA masked"], strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_mix_is_as_it_says():
    lengths = sorted(bench.mixed(2**18))
    assert sum(lengths) == 2**18 and lengths[-1] == 1500
    assert abs(lengths[len(lengths) // 2] - 136) < 15
    assert abs(lengths[len(lengths) * 9 // 10] - 440) < 50


def test_what_a_case_takes():
    shape = Shape(8, 2, 1, 4, BF16, 4)
    assert shape.forward_flops == 4 * 4 * 2 * 2 * 10
    assert shape.bytes(backward=False) == 8 * (6 * 4 * 2 + 2 * 4)
    assert shape.bytes(backward=True) == 8 * (18 * 4 * 2 + 4 * 4)
    long = Shape(16384, 32, 8, 128, BF16, 16384)
    forward = 4 * 128 * 32 * (16384 * 16385 / 2) / (0.6 * 790e12)
    assert long.h200_seconds(backward=False) == pytest.approx(forward)
    assert long.h200_seconds(backward=True) == pytest.approx(forward * (1 + 2.5 * 0.6 / 0.45))
    assert long._replace(dtype=F32).h200_seconds(backward=True) is None
