"""Checks that moments are finite when they are read, because update() does not wait for the device to check tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def require_finite(name: str, mean: Tensor, variances: Tensor | None, precision: str) -> None:
    """Check that the mean (d,) and, if given, the variances (d,) are finite; then every covariance is.

    Raises:
        ValueError: They are not finite. The message names the columns and the cause.
    """
    if mean.device.type == "meta":  # has no values
        return
    off = ~torch.isfinite(mean)
    why = "the rows contain NaN or infinity, or their sum exceeds the range of floating point"
    if variances is not None and not bool(off.any()):
        off = ~torch.isfinite(variances)
        why = "the mean is finite, but squares exceed the range of "
        if precision == "exact":
            why += "float64, or of float32 in moments merged from another precision; scale the tokens"
        else:
            why += 'float32, or of float64 for float64 tokens; use precision="exact" or scale the tokens'
    if bool(off.any()):
        columns = off.nonzero().flatten().tolist()
        listed = ", ".join(map(str, columns[:8])) + ", ..." * (len(columns) > 8)
        raise ValueError(f"{name}: is not finite in {len(columns)} of {len(off)} columns ({listed}): {why}")
