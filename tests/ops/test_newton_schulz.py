"""newton_schulz: exact values, both forms, properties, edges, refusals, on each backend."""

import importlib

import pytest
import torch
from fasttrain_kernels import UnsupportedKernel, choose, newton_schulz, testing
from fasttrain_kernels.dispatch import OPS
from fasttrain_kernels.ops.newton_schulz import cpu_kernel, forms, reference, self_test
from fasttrain_kernels.ops.newton_schulz.reference import QUINTIC
from fasttrain_kernels.testing_newton_schulz import newton_schulz_expected

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
METHODS = ["direct", "gram"]


def kernel_of(backend):
    """The module that implements a backend."""
    return OPS["newton_schulz"].candidate(backend).load()


def random_matrices(*shape, dtype=F32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def with_singular_values(values, columns, seed=0):
    """(n, columns) float64 of such singular values, and of random directions."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=F64))[0]
        for n in (len(values), columns)
    )
    return (left * values.double()) @ right.T


def assert_exact(place, matrices, steps=5, coefficients=QUINTIC, method="direct"):
    options = {"steps": steps, "coefficients": coefficients, "method": method}
    result = newton_schulz(matrices, backend=place.backend, **options)
    stored = kernel_of(place.backend).iterates(matrices.dtype)
    expected = newton_schulz_expected(
        matrices, steps, coefficients, method, stored, place.truncating
    )
    assert expected.ratio(result) <= 1
    assert result.dtype == matrices.dtype and result.is_contiguous()


# ---- 1. each backend against exact values --------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 7), (2, 16, 16), (1, 90, 40)])
def test_matches_exact_values(place, shape, method):
    assert_exact(place, random_matrices(*shape, device=place.device), method=method)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_of_16_bits(place, dtype):
    assert_exact(place, random_matrices(2, 20, 28, dtype=dtype, device=place.device))


@pytest.mark.parametrize("steps", [1, 3, 6])
@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_steps(place, steps, method):
    matrices = random_matrices(1, 20, 30, device=place.device)
    assert_exact(place, matrices, steps=steps, method=method)


def test_other_coefficients(place):
    cubic = (1.5, -0.5, 0.0)
    matrices = random_matrices(1, 12, 30, device=place.device)
    assert_exact(place, matrices, steps=3, coefficients=cubic, method="gram")


def test_self_test_passes(place):
    worst = self_test.parity(kernel_of(place.backend), torch.device(place.device), place.truncating)
    assert 0 < worst <= 1


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("method", METHODS)
def test_in_float64_all_agree(backend, method):
    for shape in ((2, 30, 90), (2, 90, 30), (2, 40, 40)):
        matrices = random_matrices(*shape, dtype=F64)
        exact = reference.forward(matrices, 5, QUINTIC, "direct")
        result = newton_schulz(matrices, method=method, backend=backend)
        assert (result - exact).norm() <= 1e-11 * exact.norm()


# ---- 2. the two forms ----------------------------------------------------------------------------

SPECTRA = {
    "a power": torch.arange(1, 49) ** -0.5,
    "one alone": torch.tensor([1.0] + 47 * [1e-3]),
    "half of the rank": torch.tensor(24 * [1.0] + 24 * [0.0]),
    "four decades": torch.logspace(0, -4, 48),
}


def error_of(matrices, method, dtype):
    """Of the products of forms.py, each rounded to `dtype`; relative to the result."""
    exact = reference.forward(matrices, 5, QUINTIC, "direct")

    def symmetric(left, right, out, *, scale=1.0, plus=None, times=0.0, diagonal=0.0):
        value = scale * (left @ right.mT) + (0.0 if plus is None else times * plus)
        value.diagonal(dim1=1, dim2=2).add_(diagonal)
        out.copy_((value.tril() + value.tril(-1).mT).to(dtype))

    def wide(square, x, out, *, times=0.0):
        out.copy_((square @ x + times * x).to(dtype))

    x = (matrices / reference.norms(matrices)).to(dtype).double()
    found = forms.iterate(x, 5, QUINTIC, method, forms.Products(symmetric, wide))
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_gram_form_is_nearly_as_near_as_direct_form(spectrum):
    """And in float16, as on a GPU, nearer than the direct form is in bfloat16."""
    matrices = with_singular_values(SPECTRA[spectrum], 120)[None]
    for dtype in (F16, F32):
        assert error_of(matrices, "gram", dtype) <= 4 * error_of(matrices, "direct", dtype)
    assert error_of(matrices, "gram", F16) < error_of(matrices, "direct", BF16)


def test_begins_anew_after_few_steps():
    assert [list(forms.runs(steps)) for steps in (1, 2, 5, 9)] == [[1], [2], [2, 3], [2, 3, 3, 1]]


def test_auto_takes_gram_where_one_side_is_twice_the_other():
    def method(*shape):
        return OPS["newton_schulz"].describe(
            device="cpu", dtype=F32, short=min(shape), long=max(shape)
        ).method

    assert [method(*s) for s in ((8, 8), (8, 15), (8, 16), (16, 8))] == [
        "direct",
        "direct",
        "gram",
        "gram",
    ]
    matrices = random_matrices(8, 16)
    assert torch.equal(newton_schulz(matrices), newton_schulz(matrices, method="gram"))


def products_of(place):
    return importlib.import_module(kernel_of(place.backend).__name__).PRODUCTS


def test_symmetric_products_are_symmetric_to_the_last_bit(place, monkeypatch):
    if place.backend == "eager":
        pytest.skip("the definition makes no use of symmetry")
    monkeypatch.setattr(cpu_kernel, "PANEL", 32)
    stored = kernel_of(place.backend).iterates(F32)
    base = random_matrices(2, 100, 100, device=place.device) / 10
    square = (base + base.mT).to(stored)
    power = (square @ square).to(stored)
    power = (power + power.mT) / 2  # commutes with square, but for rounding
    out = torch.full_like(square, torch.nan)
    products_of(place).symmetric(
        square, power, out, scale=0.5, plus=square, times=2.0, diagonal=3.0
    )
    assert torch.equal(out, out.mT)
    exact = 0.5 * square.double() @ power.double() + 2 * square.double()
    exact += 3 * torch.eye(100, dtype=F64, device=place.device)
    size = 0.5 * square.double().abs() @ power.double().abs() + 2 * square.double().abs() + 3
    assert ((out.double() - exact).abs() <= 4 * testing.ROUNDOFF[stored] * size).all()


# ---- 3. properties -------------------------------------------------------------------------------


def test_singular_values_come_near_one(place):
    values = torch.linspace(0.01, 1, 30)
    matrix = with_singular_values(values, 50).float().to(place.device)
    found = torch.linalg.svdvals(newton_schulz(matrix, backend=place.backend).double())
    assert 0.67 < found.min() and found.max() < 1.22


def test_a_factor_changes_nothing(place):
    matrices = random_matrices(1, 20, 48, device=place.device)
    found = [newton_schulz(matrices * 2.0**k, backend=place.backend) for k in (-10, 0, 30)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])


def test_the_transpose_gives_the_transpose(place):
    matrices = random_matrices(2, 20, 33, dtype=F32, device=place.device)
    result = newton_schulz(matrices, backend=place.backend)
    other = newton_schulz(matrices.mT, backend=place.backend)
    torch.testing.assert_close(other.mT, result, rtol=0.0, atol=2e-3)


def test_is_bitwise_repeatable(place):
    matrices = random_matrices(2, 40, 90, dtype=BF16, device=place.device)
    first = newton_schulz(matrices, backend=place.backend)
    assert torch.equal(first, newton_schulz(matrices, backend=place.backend))


# ---- 4. edges ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_zeros_stay_zeros_and_nan_stays_in_its_matrix(place, method):
    matrices = random_matrices(4, 20, 48, device=place.device)
    alone = newton_schulz(matrices[3:], method=method, backend=place.backend)
    matrices[0], matrices[1, 3, 5], matrices[2, 0, 0] = 0.0, torch.nan, torch.inf
    found = newton_schulz(matrices, method=method, backend=place.backend)
    assert torch.equal(found[0], torch.zeros_like(found[0]))
    assert found[1].isnan().any() and found[2].isnan().any()
    assert found[3].isfinite().all()
    torch.testing.assert_close(found[3:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 5, 0), (0, 3)])
def test_nothing_gives_nothing(place, shape):
    result = newton_schulz(torch.ones(shape, device=place.device), backend=place.backend)
    assert result.shape == shape


def test_any_strides_and_no_history(place):
    base = random_matrices(24, 40, 3, device=place.device)
    odd = base.permute(2, 1, 0)[:, ::2].requires_grad_()  # (3, 20, 24)
    result = newton_schulz(odd, backend=place.backend)
    plain = newton_schulz(odd.detach().contiguous(), backend=place.backend)
    # Norms are added up in the order of memory.
    torch.testing.assert_close(result, plain, rtol=0.0, atol=2e-3)
    assert not result.requires_grad and result.is_contiguous()
    alone = newton_schulz(odd[0], backend=place.backend)
    torch.testing.assert_close(alone, plain[0], rtol=0.0, atol=2e-3)
    with torch.autocast(place.device, dtype=BF16):
        assert torch.equal(newton_schulz(odd, backend=place.backend), result)


def test_every_element_is_written_and_none_of_the_input(place):
    matrices = random_matrices(2, 19, 45, device=place.device)
    before = matrices.clone()
    with testing.nan_filled_memory():
        result = newton_schulz(matrices, backend=place.backend)
    assert result.isfinite().all() and torch.equal(matrices, before)


# ---- 5. refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("matrices", "options", "message"),
    [
        (torch.ones(3), {}, r"matrices \(3,\) must be \(m, n\) or \(B, m, n\)"),
        (torch.ones(2, 2, dtype=torch.int32), {}, "matrices is int32; expected one of"),
        (torch.ones(2, 2), {"steps": 0}, "steps=0; expected 1 or more"),
        (torch.ones(2, 2), {"coefficients": (1.0, 2.0)}, "expected three numbers: a, b, c"),
        (torch.ones(2, 2), {"method": "svd"}, "method='svd'; expected one of auto, direct, gram"),
    ],
)
def test_what_does_not_fit_is_refused(matrices, options, message):
    with pytest.raises(ValueError, match=message):
        newton_schulz(matrices, **options)


def test_triton_says_why_it_can_not_serve():
    with pytest.raises(UnsupportedKernel, match="triton"):
        newton_schulz(torch.ones(2, 2, dtype=F64), backend="triton")
    row = choose("newton_schulz", device="cpu", dtype=F32, short=8, long=8)
    assert row.backend in ("cpu", "eager")
