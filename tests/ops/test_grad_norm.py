"""The norm of all gradients on every backend."""

import math

import pytest
import torch
from fasttrain_kernels import grad_norm
from fasttrain_kernels.testing_optimizer import norm_expected

SHAPES = [(), (0,), (1051,), (40, 500), (3, 1, 2)]


def gradients(place, *dtypes, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(shape, generator=generator) * scale).to(place.device, dtypes[i % len(dtypes)])
        for i, shape in enumerate(SHAPES)
    ]


def norm(place, tensors):
    return grad_norm(tensors, backend=place.backend)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32,), (torch.bfloat16,), (torch.float32, torch.bfloat16)]
)
def test_it_is_exact_to_its_roundings(place, dtypes):
    for scale in (1.0, 1e-15, 1e15):
        tensors = gradients(place, *dtypes, scale=scale)
        result = norm(place, tensors)
        assert (result.shape, result.dtype) == ((), torch.float32)
        assert norm_expected(tensors).ratio(result) <= 1


def test_it_is_torchs(place):
    tensors = gradients(place, torch.float32)
    theirs = torch.nn.utils.get_total_norm(tensors)
    torch.testing.assert_close(norm(place, tensors), theirs, rtol=1e-6, atol=0)


def test_gaps_and_orders_of_memory(place):
    whole = torch.randn(40, 60, device=place.device)
    tensors = [whole.t(), whole[::2, ::3], whole[:1].expand(5, 60), whole[:, 1:]]
    assert norm_expected([t.contiguous() for t in tensors]).ratio(norm(place, tensors)) <= 1


def test_what_is_not_finite(place):
    for bad in (math.inf, math.nan):
        tensors = gradients(place, torch.float32)
        tensors[3][7, 7] = bad
        assert not norm(place, tensors).isfinite()
    for huge in (3e19, 3e38):  # its square is beyond float32
        assert not norm(place, [torch.tensor([huge], device=place.device)]).isnan()


def test_nothing_and_other_dtypes():
    assert grad_norm([]).item() == 0
    assert grad_norm([torch.zeros(0)]).item() == 0
    wide = [torch.tensor([3.0], dtype=torch.float64), torch.tensor([4.0])]
    assert grad_norm(wide).item() == 5
    mixed = [torch.tensor([3.0], dtype=torch.float16), torch.tensor([4.0])]
    assert grad_norm(mixed).item() == 5
    with pytest.raises(ValueError, match=r"gradients\[1\] is int64"):
        grad_norm([torch.zeros(1), torch.zeros(1).long()])


def test_the_bits_do_not_depend_on_the_number_of_threads():
    tensors = [torch.randn(100_003), torch.randn(17, 9000)]
    threads = torch.get_num_threads()
    try:
        found = set()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.add(grad_norm(tensors).item())
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1
