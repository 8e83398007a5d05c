"""Symmetry of matrices: checks and the symmetric part. On a CPU, one pass of the compiled kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from mir_kernels._gate import is_memory
from mir_kernels._native import DTYPE_CODES, MISSING, C


def mirrored(x: Tensor) -> bool:
    """Whether x (..., d, d) equals its transpose entry for entry."""
    if native_reads(x):
        return not _flags(x, 1.0) & C.NOT_MIRRORED
    # Panels stay in cache for the transposed reads: on a CPU, four times faster than one comparison at d = 2048.
    block = 128 if x.device.type == "cpu" else x.shape[-1]
    return all(
        torch.equal(x[..., j:, j : j + block], x[..., j : j + block, j:].mT) for j in range(0, x.shape[-1], block)
    )


def surely_semidefinite_like(x: Tensor, allowed: float) -> bool:
    """Whether x (..., d, d) is known to pass all checks; False if they were not made.

    It is finite. Up to `allowed` of its largest entry it is symmetric, has no negative diagonal entry, and no nonzero
    entry in a row whose diagonal entry is zero.
    """
    return native_reads(x) and not _flags(x, allowed) & ~C.NOT_MIRRORED


def symmetrize(a: Tensor) -> Tensor:
    """(A + A^T) / 2 in float64, without overflow; A itself if it is symmetric."""
    if mirrored(a):
        return a.double()
    if not native_reads(a):
        half = a.double() / 2
        return half + half.mT
    out = torch.empty_like(a, dtype=torch.float64)
    d = a.shape[-1]
    C.symmetrize(a.data_ptr(), out.data_ptr(), out.numel() // (d * d), d, DTYPE_CODES[a.dtype], torch.get_num_threads())
    return out


def native_reads(x: Tensor) -> bool:
    """Whether the compiled kernels can read x (..., d, d) without a copy."""
    return (
        MISSING is None
        and x.device.type == "cpu"
        and is_memory(x)
        and x.dtype in (torch.float64, torch.float32)
        and x.is_contiguous()
        and x.numel() > 0
    )


def _flags(x: Tensor, allowed: float) -> int:
    d = x.shape[-1]
    count = x.numel() // (d * d)
    workspace = torch.empty(C.symmetry_workspace(count, d), dtype=torch.float64, device=x.device)
    arguments = (x.data_ptr(), workspace.data_ptr(), count, d, allowed, DTYPE_CODES[x.dtype], torch.get_num_threads())
    return C.symmetry(*arguments)
