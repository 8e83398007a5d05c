"""The packed lower triangle of the second moment: panels of PANEL rows, each cut off at its diagonal block.

Panel p holds rows pP..(p+1)P-1 and columns 0..(p+1)P-1, row by row, one panel after the other: P^2 p(p+1)/2 entries lie
before it. That is d^2/2 + dP/2 entries in place of d^2, every panel a plain matrix that a product can be written to.
Entries right of the diagonal, inside the diagonal blocks, have no meaning.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PANEL = 256  # 6% above d(d+1)/2 at d = 4096; narrower panels make slower products


def entries(d: int) -> int:
    """Numbers stored for a d x d symmetric matrix."""
    full, rest = divmod(d, PANEL)
    return PANEL * PANEL * full * (full + 1) // 2 + rest * d


def panels(packed: Tensor, d: int) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, row after the last, view of the panel (rows, row after the last)) for each panel."""
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
    """Adds sum_r weights[r] vectors[r] vectors[r]^T, vectors (r, d) and weights (r,), to the triangle in place."""
    weighted = vectors * weights[:, None]
    for start, stop, panel in panels(packed, d):
        panel.addmm_(weighted[:, start:stop].T, vectors[:, :stop])
