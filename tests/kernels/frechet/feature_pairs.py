"""Pairs of features with difficult moments: large means, unequal scales, few rows, very low rank."""

from __future__ import annotations

import random

import torch
from torch import Tensor

RATIOS = [0.0, 1.0, 1e4, 1e5, 1e6, 1e8]  # of mean to standard deviation


def features(seed: int, ratio: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A random pair with few or many rows, of one of many kinds."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    d = rng.choice([1, 2, 3, 4])
    x, y = (
        torch.randn(n, d, generator=generator, dtype=torch.float64)
        for n in (rng.choice([2, 3, d + 1, 9, 40]), rng.choice([2, 3, d + 1, 11, 30]))
    )
    kind = rng.choice(["plain", "scales", "massive", "same", "close", "correlated", "constant"])
    if kind == "scales":
        scales = 10.0 ** (12 * torch.rand(d, generator=generator, dtype=torch.float64) - 6)
        x, y = x * scales, y * scales
    elif kind == "massive":
        x[:, 0] *= 1e9
        y[:, -1] *= rng.choice([1, 1e9])
    elif kind == "same":
        y = x.flip(0)
    elif kind == "close":
        y = x * (1 + 1e-9)
    elif kind == "correlated":
        x[:, -1] = 0.1 * x[:, 0] + rng.choice([0, 1e-7]) * x[:, -1]
    elif kind == "constant":
        x[:, 0], y[:, 0] = 0.1, 0.3
        x[:, -1] = 0.7
    offset = ratio * (torch.randn(d, generator=generator, dtype=torch.float64) if rng.random() < 0.5 else 1.0)
    return (x + offset).to(dtype), (y + offset).to(dtype)
