"""The packed lower triangle of the second moment: panels of PANEL rows, each ending with its diagonal block.

Panel p holds rows pP..(p+1)P-1 and columns 0..(p+1)P-1 in row-major order. Panels are stored one after the other, so
P^2 p(p+1)/2 entries precede panel p. This needs d^2/2 + dP/2 entries instead of d^2, and every panel is a plain matrix
that a product can be written to. Entries above the diagonal, inside the diagonal blocks, are undefined.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PANEL = 256  # 6 % more than d(d+1)/2 entries at d = 4096; products with narrower panels are slower


def entries(d: int) -> int:
    """Number of entries stored for a symmetric d x d matrix."""
    full, rest = divmod(d, PANEL)
    return PANEL * PANEL * full * (full + 1) // 2 + rest * d


def panels(packed: Tensor, d: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, stop, view of the panel (stop - start, stop)) for each panel of rows start..stop-1."""
    offset = 0
    for start in range(0, d, PANEL):
        stop = min(start + PANEL, d)
        size = (stop - start) * stop
        yield start, stop, packed[offset : offset + size].view(stop - start, stop)
        offset += size


def unpack(packed: Tensor, d: int) -> Tensor:
    """The symmetric matrix (d, d)."""
    out = packed.new_empty(d, d)
    for start, stop, panel in panels(packed, d):
        below, block = panel[:, :start], panel[:, start:]
        out[start:stop, :start] = below
        out[:start, start:stop] = below.T
        out[start:stop, start:stop] = block.tril() + block.tril(-1).T
    return out


def diagonal(packed: Tensor, d: int) -> Tensor:
    """The diagonal (d,)."""
    return torch.cat([panel[:, start:].diagonal() for start, _, panel in panels(packed, d)])


def add_outer(packed: Tensor, d: int, vectors: Tensor, weights: Tensor) -> None:
    """Add sum_r weights[r] vectors[r] vectors[r]^T, vectors (r, d) and weights (r,), to the triangle in place."""
    weighted = vectors * weights[:, None]
    for start, stop, panel in panels(packed, d):
        panel.addmm_(weighted[:, start:stop].T, vectors[:, :stop])
