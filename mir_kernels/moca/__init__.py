"""MoCa, the learnable scale and shift of vision tokens (Eq. 5 of the MIR paper), alone or fused."""

from mir_kernels.moca.functional import add_moca_rms_norm, moca
from mir_kernels.moca.module import MoCa
from mir_kernels.moca.rows import OPERATIONS

__all__ = ["OPERATIONS", "MoCa", "add_moca_rms_norm", "moca"]
