"""Difficult pairs of covariances, and the errors promised for them."""

import functools

import mpmath
import torch

from kernels.covariances import covariance, mpmath_truth
from mir_kernels.ops.frechet.report import TOLERANCE

D = 96
# (backend, precision, promised relative error). float64 singular values do not depend on the precision.
PATHS = [("linalg", "float32", 1e-8), *(("eager", precision, TOLERANCE[precision]) for precision in TOLERANCE)]


def pair(kind: str, d: int = D, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return covariance(kind, d, seed), covariance(kind, d, seed + 100)


@functools.cache
def exact_trace(kind: str) -> mpmath.mpf:
    return mpmath_truth(*pair(kind, 10))
