"""The vector that is subtracted from a block of tokens before its products are computed."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows sampled for the shift of a block if reading all of them would cost a separate pass.
SAMPLE = 512


def block_centre(x: Tensor, mask: Tensor | None, added: Tensor, count: Tensor, mean: Tensor, *, host: bool) -> Tensor:
    """A vector near the mean of the block x (rows, d), so that values rounded to float32 are as small as deviations.

    This is the running `mean` once it covers at least as many rows (`count`) as the block adds (`added`). Before that,
    a block far from it would make the covariance grow with the error of the shift, so the mean of the block or of a
    sample of it is used. host: the counts are known without waiting for a device.
    """
    if host and count >= added:
        return mean
    step = 1 if host else -(-x.shape[0] // SAMPLE)
    sample = x[::step]
    if mask is None:
        own = sample.sum(0, dtype=torch.float64) / sample.shape[0]
    else:
        kept = mask[::step]
        own = torch.where(kept[:, None], sample, 0).sum(0, dtype=torch.float64) / kept.sum().clamp(min=1)
    return torch.where(count >= added, mean, own)
