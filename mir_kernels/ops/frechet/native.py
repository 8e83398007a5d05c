"""The compiled CPU kernels of the root: standard form, reduction to a band, traces of inverses of a band."""

from __future__ import annotations

import torch
from torch import Tensor

from mir_kernels._native import DTYPE_CODES, MISSING, C

__all__ = [
    "MISSING",
    "band",
    "checked_standard_form",
    "inverse_traces",
    "roundings",
    "shifted_factors",
    "standard_form",
]


def standard_form(a: Tensor, b: Tensor, *, banded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """M = C^T A C 4^-exponent with C C^T = B for a, b (batch, d, d), the size of its rounding, and the exponent.

    M is (batch, n, n) with n >= d, symmetric, zero beyond d; its rounding (batch,) as in `StandardForm`. banded: use
    the rows and strides that `band` requires.
    """
    count, d = a.shape[:2]
    block = C.BAND_WIDTH if banded else C.STANDARD_FORM_BLOCK
    rows = -(-d // block) * block
    # Rows an odd number of cache lines apart, so that the rows of a tile do not map to the same cache sets.
    stride = rows + 8 if banded else rows
    m, numbers = a.new_empty(count, rows, stride), a.new_empty(2, count)
    threads = torch.get_num_threads()
    workspace = a.new_empty(C.standard_form_workspace(count, rows, threads))
    a, b = a.contiguous(), b.contiguous()
    C.standard_form(
        *(a.data_ptr(), b.data_ptr(), m.data_ptr(), numbers[0].data_ptr(), numbers[1].data_ptr()),
        *(workspace.data_ptr(), count, d, rows, stride, threads),
    )
    return m[:, :, :rows], numbers[0], numbers[1]


def checked_standard_form(
    a: Tensor, b: Tensor, allowed_a: float, allowed_b: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`standard_form` of a, b (..., d, d), float32 or float64, contiguous; None if either is not a covariance.

    allowed_a, allowed_b: asymmetry relative to the largest entry, as in `_checks.symmetric`.
    """
    d = a.shape[-1]
    count, threads = a.numel() // (d * d), torch.get_num_threads()
    rows = -(-d // C.STANDARD_FORM_BLOCK) * C.STANDARD_FORM_BLOCK
    room = C.checked_standard_form_workspace(count, d, rows, threads)
    size = count * rows * rows
    numbers = torch.empty(size + 2 * count + room, dtype=torch.float64, device="cpu")  # one allocation for all
    start = numbers.data_ptr()
    rounding, exponent, workspace = (start + 8 * at for at in (size, size + count, size + 2 * count))
    flags = C.checked_standard_form(
        *(a.data_ptr(), b.data_ptr(), start, rounding, exponent, workspace, count, d, rows),
        *(allowed_a, allowed_b, DTYPE_CODES[a.dtype], DTYPE_CODES[b.dtype], threads),
    )
    if flags:
        return None
    return (
        numbers[:size].view(count, rows, rows),
        numbers[size : size + count],
        numbers[size + count : size + 2 * count],
    )


def shifted_factors(m: Tensor, d: int, shifts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The diagonals (n, d) of the Cholesky factors L of m + s I, |L|_F (n,), and a bound of | |L| |_2 (n,).

    m: (n, n) float64 as `standard_form` returns it.  shifts: (n,), float64. The norms are NaN where a pivot is lost.
    """
    pivots, norms = m.new_empty(shifts.numel(), d), m.new_empty(shifts.numel(), 2)
    workspace = m.new_empty(C.shifted_factors_workspace(d))
    C.shifted_factors(
        *(m.data_ptr(), shifts.data_ptr(), pivots.data_ptr(), norms.data_ptr(), workspace.data_ptr()),
        *(shifts.numel(), d, m.stride(0), torch.get_num_threads()),
    )
    return pivots, norms[:, 0], norms[:, 1]


def roundings(d: int) -> int:
    """The most roundings that a term passes through in an entry of `standard_form`, its factor or shifted factors."""
    return C.roundings(d)


def band(m: Tensor, d: int) -> Tensor:
    """A band T with the eigenvalues of m, as (d, w + 1) with entry [j, r] = T[j + r, j], w = `C.BAND_WIDTH`.

    m: (n, n) float64, symmetric, zero beyond d, n as `standard_form` returns it; overwritten.
    """
    threads = torch.get_num_threads()
    out = m.new_empty(d, C.BAND_WIDTH + 1)
    workspace = m.new_empty(C.band_reduction_workspace(d, threads))
    C.band_reduction(m.data_ptr(), out.data_ptr(), workspace.data_ptr(), d, m.stride(0), threads)
    return out


def inverse_traces(band: Tensor, shifts: Tensor) -> Tensor:
    """Tr((T + s I)^-1) for each s of `shifts`, NaN where a pivot of T + s I is not positive.

    band (d, w + 1), float64: T as `band` returns it. shifts: (n,), float64.
    """
    rows, width = band.shape[0], band.shape[1] - 1
    traces = torch.empty_like(shifts)
    workspace = torch.empty(C.band_inverse_traces_workspace(width, shifts.numel()), dtype=torch.float64, device="cpu")
    C.band_inverse_traces(
        *(band.data_ptr(), shifts.data_ptr(), traces.data_ptr(), workspace.data_ptr(), rows, width, shifts.numel()),
        torch.get_num_threads(),
    )
    return traces
