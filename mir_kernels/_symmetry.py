"""Symmetric matrices: whether they are, and what is symmetric in them. On a CPU by one pass of the compiled kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from mir_kernels._gate import is_memory
from mir_kernels._native import DTYPE_CODES, MISSING, C


def mirrored(x: Tensor) -> bool:
    """Whether x (..., d, d) is its own transpose, entry for entry."""
    if native_reads(x):
        return not _flags(x, 1.0) & C.NOT_MIRRORED
    # Panels stay in cache while they are read across: on a CPU four times faster than one comparison at d = 2048.
    block = 128 if x.device.type == "cpu" else x.shape[-1]
    return all(
        torch.equal(x[..., j:, j : j + block], x[..., j : j + block, j:].mT) for j in range(0, x.shape[-1], block)
    )


def surely_semidefinite_like(x: Tensor, allowed: float) -> bool:
    """Whether x (..., d, d) is known to be finite and, up to `allowed` of its largest entry, symmetric with a diagonal
    of no negative entry and no entry beside a diagonal one of zero. False where that was not looked at.
    """
    return native_reads(x) and not _flags(x, allowed) & ~C.NOT_MIRRORED


def symmetrize(a: Tensor) -> Tensor:
    """(A + A^T) / 2 in float64, without overflow; A itself where it is symmetric."""
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
    """Whether the compiled kernels take x (..., d, d) as it lies in memory."""
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
