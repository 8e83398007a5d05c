"""N = Ca^T Cb for covariances Ca Ca^T = A and Cb Cb^T = B: its singular values sum to Tr((AB)^(1/2))."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mir_kernels.ops.sqrtm import factor, float64
from mir_kernels.ops.sqrtm.factor import Factor, blocks


class NotSemidefinite(ValueError):
    """The matrix `name` is indefinite; lowest: its smallest eigenvalue relative to its equilibrated diagonal."""

    def __init__(self, name: str, lowest: float) -> None:
        super().__init__(
            f"{name}: expected positive semi-definite matrices, got one with an eigenvalue of {lowest:.3g} relative to "
            "its diagonal scaled to 1"
        )
        self.name, self.lowest = name, lowest

    def named(self, name: str) -> NotSemidefinite:
        """The same error under the caller's name of the argument."""
        return NotSemidefinite(name, self.lowest)


class CrossFactor(NamedTuple):
    """Tr((AB)^(1/2)) = 2^exponent |N|_*, to within `rounding` of |N|_*.

    how: the factorization behind N, "cholesky", "split cholesky" (products by `sqrtm/float64.py`) or "eigh".
    """

    n: Tensor
    exponent: Tensor
    rounding: Tensor
    how: tuple[str, ...]

    def trace(self, nuclear_norms: Tensor) -> Tensor:
        """Tr((AB)^(1/2)) from the nuclear norms of `n`."""
        return float64.times_power(nuclear_norms, self.exponent)

    def relative_rounding(self, nuclear_norms: Tensor) -> Tensor:
        """`rounding` relative to the nuclear norms of `n`."""
        return torch.where(self.rounding > 0, self.rounding / nuclear_norms, 0.0)


def cross_factor(a: Tensor, b: Tensor, indefinite: float) -> CrossFactor:
    """The cross factor of symmetric float64 a, b (batch, d, d); one shared by the whole batch is (1, d, d).

    Raises NotSemidefinite for an eigenvalue below -`indefinite` relative to the equilibrated diagonal, which rounding
    of a covariance cannot explain.
    """
    x, y = factor.factor(a), factor.factor(b)
    for name, c in (("a", x), ("b", y)):
        if bool((c.lowest < -indefinite).any()):
            raise NotSemidefinite(name, float(c.lowest.amin()))
    singular = (x.singular | y.singular).tolist()
    n = cross_product(x.columns, y.columns, triangular=not any(singular))
    split = "split " * float64.in_blocks(a)
    how = tuple("eigh" if s else f"{split}cholesky" for s in singular)
    return CrossFactor(n, x.exponent + y.exponent, _rounding(x, y), how)


def cross_product(x: Tensor, y: Tensor, *, triangular: bool) -> Tensor:
    """X^T Y; if both are lower triangular, without the zeros above the diagonals."""
    parts = blocks(x.shape[-1])
    if not triangular or len(parts) == 1:
        return float64.matmul(x.mT, y)
    if x.dim() == 3 and x.shape[0] == y.shape[0] == 1:  # one product is faster than a batch of one
        return cross_product(x[0], y[0], triangular=True)[None]
    out = torch.empty_like(x if x.numel() >= y.numel() else y)
    for i0, i1 in parts:
        for j0, j1 in parts:
            k = max(i0, j0)
            out[..., i0:i1, j0:j1] = float64.matmul(x[..., k:, i0:i1].mT, y[..., k:, j0:j1])
    return out


def _rounding(x: Factor, y: Factor) -> Tensor:
    """An estimate of the change in the nuclear norm of Cx^T Cy due to rounding in the two factors.

    |Ra^T D Cy|_* - |R^T D Cy|_* <= |Ra - R|_F |D Cy|_F for square roots R of the equilibrated matrix and Ra of the
    matrix that was factored exactly (the triangle inequality, then Cauchy-Schwarz), D = diag(scale); likewise for y.
    """
    first = x.rounding * torch.linalg.vector_norm(x.scale[..., None] * y.columns, dim=(-2, -1))
    return first + y.rounding * torch.linalg.vector_norm(y.scale[..., None] * x.columns, dim=(-2, -1))
