"""The promises of `polar` for the Triton backend: on a CUDA device, or in the interpreter if selected before import."""

import os

import pytest
import torch

from kernels.sqrtm.polar_cases import (
    DTYPES,
    ERROR,
    SPECTRA,
    assert_resolved,
    assert_zeros_stay,
    spectrum,
    with_singular_values,
)
from tolerances import relative_error

pytest.importorskip("triton")

from mir_kernels.ops.sqrtm import polar

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
PRECISIONS = ["bfloat16", "float16", "float32"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_factor_is_that_of_the_matrix_as_given(precision, dtype):
    m = with_singular_values(spectrum("even steps", 9, 0.1), 20, seed=0)[0].to(dtype).to(DEVICE)
    w, _, vt = torch.linalg.svd(m.double(), full_matrices=False)
    u = polar(m, precision=precision, backend="triton")
    assert u.dtype == dtype
    assert relative_error(u, w @ vt) <= ERROR[precision] + torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_singular_values_that_are_resolved_come_out_as_one(precision, kind):
    assert_resolved(precision, kind, 12, DEVICE, "triton")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_and_columns_of_zeros_stay_zero(precision):
    assert_zeros_stay(precision, DEVICE, "triton")
