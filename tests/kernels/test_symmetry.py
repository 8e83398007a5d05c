"""Symmetry checks and symmetric parts of matrices, with the compiled pass and with torch."""

import pytest
import torch

from kernels.covariances import covariance
from mir_kernels import _symmetry
from mir_kernels._native import MISSING

NATIVE = pytest.mark.skipif(MISSING is not None, reason=f"{MISSING}")
ALLOWED = 1e-8


@pytest.fixture(params=[pytest.param("native", marks=NATIVE), "torch"])
def either(request, monkeypatch):
    """The compiled pass, and its replacement if the module is not built."""
    if request.param == "torch":
        monkeypatch.setattr(_symmetry, "MISSING", "no compiler")


@pytest.mark.parametrize("d", [1, 5, 63, 64, 65, 128, 129, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mirrored_matrix_is_told_from_one_with_a_single_entry_off(d, dtype, either):
    a = covariance("i^-1", d, 0).to(dtype)
    assert _symmetry.mirrored(a)
    assert _symmetry.mirrored(torch.stack((a, a)))
    for i, j in {(0, d - 1), (d - 1, 0), (d - 1, d - 2), (d // 2, d // 2 - 1)} if d > 1 else ():
        off = torch.stack((a, a))
        off[1, i, j] += 1e-6
        assert not _symmetry.mirrored(off)


@pytest.mark.parametrize("d", [1, 5, 63, 64, 65, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e300])
def test_the_symmetric_part_is_the_mean_of_a_matrix_and_its_transpose(d, dtype, scale, either):
    a = torch.randn(3, d, d, generator=torch.Generator().manual_seed(d), dtype=dtype)
    a = a * (min(scale, 1e37) if dtype == torch.float32 else scale)
    found = _symmetry.symmetrize(a)
    assert found.dtype == torch.float64
    assert torch.equal(found, a.double() / 2 + a.mT.double() / 2)
    assert torch.equal(_symmetry.symmetrize(found), found)


def broken(kind: str, d: int) -> torch.Tensor:
    a = covariance("i^-1", d, 0)
    i, j = d - 1, d // 3
    if kind == "not a number":
        a[i, j] = torch.nan
    elif kind == "infinite":
        a[j, i] = -torch.inf
    elif kind == "asymmetric":
        a[i, j] += 3e-8 * a.abs().amax()
    elif kind == "negative variance":
        a[i, i] = -3e-8 * a.abs().amax()
    elif kind == "covariance beside no variance":
        a[j, j] = 0.0
    return a


@NATIVE
@pytest.mark.parametrize("d", [4, 64, 65, 150])
@pytest.mark.parametrize(
    "kind", ["not a number", "infinite", "asymmetric", "negative variance", "covariance beside no variance"]
)
def test_no_broken_matrix_passes_wherever_it_stands_in_a_batch(kind, d):
    whole = covariance("i^-1", d, 1)
    assert _symmetry.surely_semidefinite_like(torch.stack((whole, whole)), ALLOWED)
    for batch in ((broken(kind, d), whole), (whole, broken(kind, d))):
        assert not _symmetry.surely_semidefinite_like(torch.stack(batch), ALLOWED)


@NATIVE
def test_what_is_within_the_tolerance_passes_and_is_not_mirrored():
    a = covariance("i^-1", 130, 0)
    a[129, 3] += 0.5e-8 * a.abs().amax()
    assert _symmetry.surely_semidefinite_like(a, ALLOWED)
    assert not _symmetry.mirrored(a)
    empty = torch.zeros(70, 70, dtype=torch.float64)
    assert _symmetry.surely_semidefinite_like(empty, ALLOWED)


@pytest.mark.parametrize("view", ["transposed", "strided", "half"])
def test_views_and_other_dtypes_go_through_torch(view):
    a = covariance("i^-1", 66, 0)
    a[3, 60] += 1.0
    x = {"transposed": a.mT, "strided": a.repeat_interleave(2, 1)[:, ::2], "half": a.half()}[view]
    assert not _symmetry.surely_semidefinite_like(x, 1.0)  # unknown, because it was not checked
    assert not _symmetry.mirrored(x)
    assert torch.equal(_symmetry.symmetrize(x), (x.double() + x.double().mT) / 2)
