"""MoCa, the learnable scale and shift of vision tokens (Eq. 5 of the MIR paper), alone or fused."""

from mir_kernels.ops.moca.functional import add_moca_rms_norm, moca
from mir_kernels.ops.moca.launch import OPERATIONS
from mir_kernels.ops.moca.module import MoCa
from mir_kernels.ops.moca.vision_mask import VisionMask

__all__ = ["OPERATIONS", "MoCa", "VisionMask", "add_moca_rms_norm", "moca"]
