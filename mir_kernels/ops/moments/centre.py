"""The vector that a block of tokens is shifted by before products are taken of it."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows that the shift of a block is taken from where reading them all would cost a pass of its own.
SAMPLE = 512


def block_centre(x: Tensor, mask: Tensor | None, added: Tensor, count: Tensor, mean: Tensor, *, host: bool) -> Tensor:
    """A vector near the mean of the block x (rows, d): what float32 rounds is then of the size of the deviations.

    Once at least as many rows (`count`) stand behind it as are coming (`added`), the running `mean` does: a block far
    away from it makes the covariance itself as large as the shift is wrong. Until then, the mean of the block or of a
    sample of it. host: the counts are known without waiting for a device.
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
