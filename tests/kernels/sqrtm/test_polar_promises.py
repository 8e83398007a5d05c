"""The promises of `polar` in each precision for any dtype of the matrix: accuracy, small and zero singular values."""

import pytest
import torch

from kernels.sqrtm.polar_cases import (
    DTYPES,
    ERROR,
    RESOLVED,
    SPECTRA,
    assert_resolved,
    assert_zeros_stay,
    of_rank,
    spectrum,
    with_singular_values,
)
from mir_kernels.ops.sqrtm import eager, polar
from tolerances import relative_error

PRECISIONS = list(RESOLVED)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(24, 24), (40, 9), (9, 40)])
def test_the_factor_is_that_of_the_matrix_as_given(precision, dtype, shape):
    m, _ = with_singular_values(spectrum("even steps", min(shape), 0.1), max(shape), seed=0)
    m = (m if shape[0] >= shape[1] else m.mT).to(dtype)
    w, _, vt = torch.linalg.svd(m.double(), full_matrices=False)
    u = polar(m, precision=precision)
    assert u.dtype == dtype
    assert relative_error(u, w @ vt) <= ERROR[precision] + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("condition", [1e3, 1e5, 1e7])
def test_float64_iterates_in_float64_on_a_coarser_matrix(dtype, condition):
    m, _ = with_singular_values(spectrum("even steps", 32, 1 / condition), 32, seed=1)
    m = m.to(dtype)
    w, _, vt = torch.linalg.svd(m.double())
    raw = eager.polar(m[None], "float64")[0]
    assert raw.dtype == torch.float64
    # The exact factor is that of the rounded matrix, whose smallest singular value rounding has changed.
    smallest = torch.linalg.svdvals(m.double())[-1].item()
    assert relative_error(raw, w @ vt) <= 2e-15 / smallest
    assert relative_error(polar(m, precision="float64"), w @ vt) <= 2e-15 / smallest + torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("n", [1, 5, 64])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_singular_values_that_are_resolved_come_out_as_one(precision, kind, n):
    assert_resolved(precision, kind, n, "cpu", "eager")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rank", "rows", "n"), [(1, 8, 4), (1, 64, 64), (16, 64, 64), (60, 64, 64), (3, 160, 160)])
def test_float64_keeps_the_rank(dtype, rank, rows, n):
    m, want = of_rank(rank, rows, n, seed=0)
    given = m.to(dtype)
    assert torch.equal(given.double(), m)
    u = polar(given, precision="float64")
    assert torch.linalg.matrix_norm(u.double() - want, 2) <= 1e-4


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("rank", "rows", "n"), [(1, 8, 4), (1, 64, 64), (60, 64, 64)])
def test_coarser_precisions_keep_the_vectors_above_a_lost_rank(precision, rank, rows, n):
    m, want = of_rank(rank, rows, n, seed=1)
    u = polar(m, precision=precision)
    _, _, vt = torch.linalg.svd(m)
    kept = vt[:rank].mT
    assert relative_error(u @ kept, want @ kept) <= 4 * ERROR[precision]
    assert torch.linalg.matrix_norm(u, 2) <= 1 + RESOLVED[precision][1]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_and_columns_of_zeros_stay_zero(precision):
    assert_zeros_stay(precision, "cpu", "eager")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [(torch.float32, -149), (torch.float32, 122), (torch.float64, -1074), (torch.float64, 1018)],
)
def test_a_power_of_two_changes_no_bit(precision, dtype, exponent):
    """From scales at which integer multiples are subnormal up to the end of the range."""
    m = torch.randint(-8, 9, (16, 12), generator=torch.Generator().manual_seed(2)).double() + 20 * torch.eye(16, 12)
    scaled = torch.ldexp(torch.ldexp(m, torch.tensor(exponent // 2)), torch.tensor(exponent - exponent // 2)).to(dtype)
    assert torch.isfinite(scaled).all()
    assert torch.count_nonzero(scaled) == torch.count_nonzero(m)
    assert torch.equal(polar(scaled, precision=precision), polar(m.to(dtype), precision=precision))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_matrix_of_a_batch_has_its_own_scale(precision):
    m = torch.stack([with_singular_values(spectrum("even steps", 8, 0.1), 8, seed)[0] for seed in range(3)])
    m = (m * torch.tensor([1e-30, 1.0, 1e30], dtype=torch.float64)[:, None, None]).float()
    together = polar(m, precision=precision)
    for one, alone in zip(together, m, strict=True):
        assert relative_error(one, polar(alone, precision=precision)) <= ERROR[precision]


def test_a_wider_default_dtype_changes_nothing():
    m, _ = with_singular_values(spectrum("even steps", 12, 0.1), 12, seed=3)
    expected = {p: polar(m.float() * 2.0**90, precision=p) for p in PRECISIONS}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        for precision in PRECISIONS:
            assert torch.equal(polar(m.float() * 2.0**90, precision=precision), expected[precision])
    finally:
        torch.set_default_dtype(before)
