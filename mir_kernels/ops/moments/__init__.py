"""Streaming mean and covariance, and token norms."""

from mir_kernels.ops.moments.functional import token_norms
from mir_kernels.ops.moments.launch import OPERATIONS
from mir_kernels.ops.moments.streaming import StreamingMoments

__all__ = ["OPERATIONS", "StreamingMoments", "token_norms"]
