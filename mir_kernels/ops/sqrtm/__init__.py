"""Square roots, inverse square roots and polar factors of batches of matrices, with gradients."""

from mir_kernels.ops.sqrtm.functional import NewtonSchulz, inverse_sqrtm, newton_schulz, polar, sqrtm
from mir_kernels.ops.sqrtm.launch import OPERATIONS

__all__ = ["OPERATIONS", "NewtonSchulz", "inverse_sqrtm", "newton_schulz", "polar", "sqrtm"]
