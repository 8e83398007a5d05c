"""The trace of the square root of a product of covariances, and the Frechet distance of two Gaussians, with bounds."""

from mir_kernels.ops.frechet.from_features import frechet_distance_from_features, trace_sqrt_from_features
from mir_kernels.ops.frechet.functional import (
    FrechetDistance,
    TraceSqrt,
    frechet_distance,
    trace_sqrt_product,
    trace_sqrt_report,
)
from mir_kernels.ops.frechet.launch import OPERATIONS

__all__ = [
    "OPERATIONS",
    "FrechetDistance",
    "TraceSqrt",
    "frechet_distance",
    "frechet_distance_from_features",
    "trace_sqrt_from_features",
    "trace_sqrt_product",
    "trace_sqrt_report",
]
