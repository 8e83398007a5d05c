"""The trace by Triton's polar factor: on a CUDA device, or in the interpreter if selected before import."""

import os

import pytest

from kernels.covariances import SPECTRA, covariance

pytest.importorskip("triton")

from mir_kernels.ops.frechet import trace_sqrt_report
from mir_kernels.ops.frechet.report import TOLERANCE

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_trace_is_as_accurate_as_promised(kind, precision):
    d = 20
    a, b = (covariance(kind, d, seed).to(DEVICE) for seed in (0, 9))
    found = trace_sqrt_report(a, b, precision=precision, backend="triton")
    expected = trace_sqrt_report(a, b, backend="linalg").value
    assert (found.value - expected).abs() <= TOLERANCE[precision] * expected
    assert found.error <= TOLERANCE[precision]
