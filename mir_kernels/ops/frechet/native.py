"""Traces of inverses of band matrices by the compiled CPU kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from mir_kernels._native import MISSING, C

__all__ = ["MISSING", "inverse_traces"]


def inverse_traces(band: Tensor, shifts: Tensor) -> Tensor:
    """Tr((T + s I)^-1) for each s of `shifts`, NaN where a pivot of T + s I is not positive.

    band (d, w + 1), float64: T as `band_reduction.reduce_` gives it. shifts: (n,), float64.
    """
    rows, width = band.shape[0], band.shape[1] - 1
    traces = torch.empty_like(shifts)
    workspace = torch.empty(C.band_inverse_traces_workspace(width, shifts.numel()), dtype=torch.float64)
    C.band_inverse_traces(
        *(band.data_ptr(), shifts.data_ptr(), traces.data_ptr(), workspace.data_ptr(), rows, width, shifts.numel()),
        torch.get_num_threads(),
    )
    return traces
