"""Kernels for the Modality Integration Rate and MoCa: streaming moments, matrix square roots, masked scale-shift.

All public names of the package are here; the operations live in `mir_kernels.ops`, one folder per operation.
"""

from mir_kernels import _dispatch, ops
from mir_kernels.ops.frechet import (
    FrechetDistance,
    TraceSqrt,
    frechet_distance,
    frechet_distance_from_features,
    trace_sqrt_from_features,
    trace_sqrt_product,
)
from mir_kernels.ops.moca import MoCa, add_moca_rms_norm, moca
from mir_kernels.ops.moments import StreamingMoments, token_norms
from mir_kernels.ops.sqrtm import NewtonSchulz, inverse_sqrtm, newton_schulz, polar, sqrtm

__version__ = "0.1.0"

__all__ = [
    "FrechetDistance",
    "MoCa",
    "NewtonSchulz",
    "StreamingMoments",
    "TraceSqrt",
    "add_moca_rms_norm",
    "backends",
    "frechet_distance",
    "frechet_distance_from_features",
    "inverse_sqrtm",
    "moca",
    "newton_schulz",
    "polar",
    "sqrtm",
    "token_norms",
    "trace_sqrt_from_features",
    "trace_sqrt_product",
]


def backends() -> _dispatch.BackendTable:
    """The backends of each operation and device that can run here, and why the others cannot.

    A mapping {operation: {"cpu" | "cuda": {backend: None or the reason}}}, best backend first; `print` shows a table.
    """
    return _dispatch.table(ops.OPERATIONS)
