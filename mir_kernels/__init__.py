"""Kernels for the Modality Integration Rate and MoCa: streaming moments, matrix square roots, masked scale-shift.

Every public name of the package is here. An operation's folder and its function may share a name (`mir_kernels.moca` is
the function); its modules are imported as `from mir_kernels.moca import reference`.
"""

from mir_kernels import _dispatch
from mir_kernels.frechet import OPERATIONS as _FRECHET
from mir_kernels.frechet import TraceSqrt, frechet_distance, trace_sqrt_product
from mir_kernels.moca import OPERATIONS as _MOCA
from mir_kernels.moca import MoCa, add_moca_rms_norm, moca
from mir_kernels.moments import OPERATIONS as _MOMENTS
from mir_kernels.moments import StreamingMoments, token_norms
from mir_kernels.sqrtm import OPERATIONS as _SQRTM
from mir_kernels.sqrtm import NewtonSchulz, inverse_sqrtm, newton_schulz, polar, sqrtm

__version__ = "0.1.0"

__all__ = [
    "MoCa",
    "NewtonSchulz",
    "StreamingMoments",
    "TraceSqrt",
    "add_moca_rms_norm",
    "backends",
    "frechet_distance",
    "inverse_sqrtm",
    "moca",
    "newton_schulz",
    "polar",
    "sqrtm",
    "token_norms",
    "trace_sqrt_product",
]


def backends() -> _dispatch.BackendTable:
    """What can run here, for each operation and device, and why the rest cannot.

    A mapping {operation: {"cpu" | "cuda": {backend: None or the reason}}}, best backend first; `print` shows a table.
    """
    return _dispatch.table((*_MOCA, *_MOMENTS, *_SQRTM, *_FRECHET))
