"""The eigenproblem of A B in standard form, C^T A C with C C^T = B (LAPACK's sygst, itype 2), and its rounding."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mir_kernels.ops.frechet import band_reduction, native
from mir_kernels.ops.frechet.band_reduction import RootSums
from mir_kernels.ops.sqrtm import factor

BANDED = 384  # from this size on `band_reduction` is faster than LAPACK's eigenvalues
_PROBES = 8


class StandardForm(NamedTuple):
    """C^T A C 4^-exponent, whose eigenvalues are those of A B: the squares of the singular values of N.

    m: (batch, n, n) float64; rows and columns from d on are zero.  d: the size of A and B.
    rounding: (batch,) an estimate of |m - C^T A C|_F, infinite where the factor C lost a pivot.
    exponent: (batch,) as in `factor.Factor`: the trace of the root is scaled by 2^exponent.
    banded: whether m is laid out for `band_reduction`.
    """

    m: Tensor
    d: int
    rounding: Tensor
    exponent: Tensor
    banded: bool


def reduce(a: Tensor, b: Tensor) -> StandardForm:
    """The standard form of symmetric float64 a, b (batch, d, d); a is neither factored nor known to be definite.

    A matrix shared by the whole batch is (1, d, d).
    """
    d = a.shape[-1]
    if a.device.type == "cpu" and native.MISSING is None:
        banded = d >= BANDED
        m, rounding, exponent = native.standard_form(*torch.broadcast_tensors(a, b), banded=banded)
        return StandardForm(m, d, rounding, exponent, banded)
    h, scale, exponent = factor.equilibrate(b)
    lower, singular = factor.cholesky(h)
    half = factor.half_exponent(a.diagonal(dim1=-2, dim2=-1).amax(-1))
    c = lower * (scale * torch.exp2(-half)[..., None])[..., None]
    m = c.mT @ (a @ c)
    probes = factor.signs_like(a, _PROBES)
    half, singular = half.expand(len(m)), singular.expand(len(m))
    apart = m @ probes - c.mT @ (a @ (c @ probes))
    rounding = (apart.square().sum((-2, -1)) / _PROBES).sqrt().masked_fill(singular, torch.inf)
    return StandardForm(m, d, rounding, exponent + half, banded=False)


def roots_(form: StandardForm) -> tuple[list[RootSums], list[float], str]:
    """Sums over the eigenvalues of each `form.m`, the relative errors of their `total`, and "eigvalsh" or "band".

    An error is infinite if C lost a pivot, or if rounding leaves A possibly indefinite or m singular. Overwrites
    form.m.
    """
    d, rounding = form.d, form.rounding.tolist()
    if form.banded:
        sums = [
            band_reduction.root_sums_(m, d) if math.isfinite(r) else RootSums(math.nan, math.inf, math.nan, 0.0)
            for m, r in zip(form.m, rounding, strict=True)
        ]
        quadrature = 2 * band_reduction.QUADRATURE
    else:
        m = form.m[:, :d, :d]
        if not all(map(math.isfinite, rounding)):
            m = m.where(form.rounding.isfinite()[:, None, None], 0.0)
        # In Python: for small matrices calls of torch would take as long as the eigenvalues.
        sums, quadrature = [_root_sums(values) for values in torch.linalg.eigvalsh(m).tolist()], 0.0
    errors = [relative_error(one, r, d) + quadrature for one, r in zip(sums, rounding, strict=True)]
    return sums, errors, "band" if form.banded else "eigvalsh"


def _root_sums(values: list[float]) -> RootSums:
    """`RootSums` from ascending eigenvalues."""
    if not values[0] > 0:
        return RootSums(sum(math.sqrt(max(x, 0.0)) for x in values), math.inf, math.hypot(*values), 0.0)
    return RootSums(sum(map(math.sqrt, values)), sum([1 / x for x in values]), math.hypot(*values), values[0])


def relative_error(sums: RootSums, rounding: float, d: int) -> float:
    """An upper estimate of the relative error of sums.total, the sum of the roots of d eigenvalues of `StandardForm.m`.

    The eigenvalues shift by D_i with sum D_i^2 <= eta^2, eta the Frobenius norm of all perturbations (Hoffman and
    Wielandt), so the sum of their roots by at most sum |D_i| / (sqrt(l_i) + sqrt(l_i - |D_i|)). If 4 eta is below the
    smallest eigenvalue, this is below 0.536 eta sqrt(sums.inverse) by Cauchy-Schwarz. C^T A C is then definite, and so
    is A by Sylvester's law of inertia, without factoring it.
    eta: twice the measured rounding, for the backward error of C, plus sqrt(d) u |m|_F for the eigenvalues.
    """
    eta = 2 * rounding + d**0.5 * factor.UNIT * sums.norm
    if not (sums.total > 0 and 4 * eta <= sums.least):  # infinite or NaN among them
        return math.inf
    return 0.54 * eta * math.sqrt(sums.inverse) / sums.total
