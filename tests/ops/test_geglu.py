"""geglu: what it doesn't share with swiglu, whose tests run with every activation."""

import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels import UnsupportedKernel, choose, geglu, swiglu, use
from fasttrain_kernels.ops.geglu import self_test
from ops.glu_calls import F64, inputs, kernel_of


def test_self_test_passes(place):
    kernel, device = kernel_of(place.backend), torch.device(place.device)
    assert 0 < self_test.parity(kernel, device, truncating=place.truncating) <= 1


def test_approximate_is_that_of_torch():
    gate, up, _ = inputs((5, 30), F64)
    default = geglu(gate, up)
    assert torch.equal(default, geglu(gate, up, approximate="tanh"))
    for approximate in ("tanh", "none"):
        expected = F.gelu(gate, approximate=approximate) * up
        torch.testing.assert_close(geglu(gate, up, approximate=approximate), expected)
        packed = torch.cat([gate, up], -1)
        torch.testing.assert_close(geglu(packed, approximate=approximate), expected)
    assert not torch.allclose(default, geglu(gate, up, approximate="none"), atol=1e-6)


def test_the_kernel_table_tells_it_from_swiglu():
    gate, up, _ = inputs((2, 8))
    with use(geglu="triton"):
        swiglu(gate, up)
        with pytest.raises(UnsupportedKernel, match="geglu: backend 'triton'"):
            geglu(gate, up)
    row = choose("geglu", device="cpu", dtype=torch.bfloat16)
    assert (row.op, row.backend) == ("geglu", "cpu")


def test_refuses_what_does_not_fit():
    gate = torch.ones(2, 4)
    with pytest.raises(ValueError, match="geglu: approximate='erf'; expected one of tanh, none"):
        geglu(gate, gate, approximate="erf")
    with pytest.raises(ValueError, match=r"geglu: up \(4,\) must have the shape of gate, \(2, 4\)"):
        geglu(gate, gate[0])
