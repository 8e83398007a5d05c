"""Whether moments are still numbers, asked when they are read: update() does not wait to look at tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def require_finite(name: str, mean: Tensor, variances: Tensor | None, precision: str) -> None:
    """The mean (d,), and the variances (d,) unless `name` is "mean", are finite: then every covariance is.

    Raises:
        ValueError: they are not; it says in which columns, and why.
    """
    if mean.device.type == "meta":  # no numbers
        return
    off = ~torch.isfinite(mean)
    why = "rows with NaN or infinity were counted, or rows whose sum left the range of floating point"
    if variances is not None and not bool(off.any()):
        off = ~torch.isfinite(variances)
        why = "the mean is finite, but squares left the range of "
        if precision == "exact":
            why += "float64, or of float32 in moments merged from another precision: scale the tokens"
        else:
            why += 'float32, or of float64 for tokens in it: take precision="exact" or scale the tokens'
    if bool(off.any()):
        columns = off.nonzero().flatten().tolist()
        listed = ", ".join(map(str, columns[:8])) + ", ..." * (len(columns) > 8)
        raise ValueError(f"{name}: is not finite in {len(columns)} of {len(off)} columns ({listed}): {why}")
