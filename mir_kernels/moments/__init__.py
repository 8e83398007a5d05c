"""Streaming mean and covariance, and token norms: StreamingMoments, token_norms."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from mir_kernels import _checks
from mir_kernels._dispatch import Operation
from mir_kernels.moments import eager, reference
from mir_kernels.moments.streaming import OPERATION as STREAMING_MOMENTS
from mir_kernels.moments.streaming import StreamingMoments

__all__ = ["OPERATIONS", "StreamingMoments", "token_norms"]

TOKEN_NORMS = Operation("token_norms", orders={"cuda": ("triton", "eager"), "cpu": ("native", "eager")})
OPERATIONS = (TOKEN_NORMS, STREAMING_MOMENTS)


def token_norms(x: Tensor, *, backend: str | None = None) -> Tensor:
    """The l2 norms ||x_t|| of tokens x `(..., d)`, f32/bf16/f16/f64, as float32 `(...)`.

    No finite f16/bf16/f32 token overflows on the way; a norm beyond float32 is infinite. Any strides; not
    differentiable.
    """
    _checks.tokens("x", x)
    name = TOKEN_NORMS.choose(backend, x.device)
    if torch.compiler.is_compiling():
        return torch.ops.mir_kernels.token_norms(x.detach(), name)
    return _token_norms(x.detach(), name)


def _token_norms(x: Tensor, backend: str) -> Tensor:
    if backend == "eager":
        return eager.token_norms(x)
    if backend == "reference":
        return reference.token_norms(x)
    implementation = importlib.import_module(f"mir_kernels.moments.{backend}")  # not before: triton is optional
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    return implementation.token_norms(rows).view(x.shape[:-1])


_LIBRARY = torch.library.Library("mir_kernels", "FRAGMENT")
_LIBRARY.define("token_norms(Tensor x, str backend) -> Tensor")
_LIBRARY.impl("token_norms", _token_norms, "CompositeExplicitAutograd")


@torch.library.register_fake("mir_kernels::token_norms", lib=_LIBRARY)
def _token_norms_fake(x: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float32)
