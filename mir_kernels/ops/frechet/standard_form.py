"""The eigenproblem of A B in standard form, C^T A C with C C^T = B (LAPACK's sygst, itype 2), and its rounding."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mir_kernels.ops.frechet import band_reduction, native
from mir_kernels.ops.frechet.band_reduction import RootSums
from mir_kernels.ops.sqrtm import factor

BLOCK = 256  # columns that go through one product
_BLOCKED = 2 * BLOCK  # from here on blocks that skip zeros are faster than whole products
_BANDED = 640  # from here on `band_reduction` is faster than the eigenvalues of LAPACK
_PROBES = 8


class StandardForm(NamedTuple):
    """C^T A C 4^-exponent, whose eigenvalues are those of A B: the squares of the singular values of N.

    m: (d, d) float64 or a batch; only its lower triangle and blocks of `BLOCK` on the diagonal need be set.
    rounding: (...) an estimate of |m - C^T A C|_F, infinite where the factor C lost a pivot.
    exponent: (...) as in `factor.Factor`: the trace of the root takes 2^exponent.
    """

    m: Tensor
    rounding: Tensor
    exponent: Tensor


def reduce(a: Tensor, b: Tensor) -> StandardForm:
    """The standard form of symmetric float64 a, b (batch, d, d); a is not factored, nor is it known to be definite."""
    if a.device.type != "cpu" or a.shape[-1] < _BLOCKED:
        return _whole(a, b)
    parts = [_blocked(x, y) for x, y in zip(a, b, strict=True)]
    if len(parts) == 1:
        return StandardForm(*(t[None] for t in parts[0]))
    return StandardForm(*(torch.stack(t) for t in zip(*parts, strict=True)))


def roots_(form: StandardForm) -> tuple[Tensor, Tensor, str]:
    """The sum of the roots of the eigenvalues of each `form.m`, its relative error, and "eigvalsh" or "band".

    The error is infinite where C lost a pivot and where A may be indefinite, or m singular, up to rounding. form.m is
    overwritten.
    """
    d, kept = form.m.shape[-1], torch.isfinite(form.rounding)
    total, error = torch.zeros_like(form.rounding), torch.full_like(form.rounding, torch.inf)
    if form.m.device.type == "cpu" and d >= _BANDED and native.MISSING is None:
        for i in torch.nonzero(kept)[:, 0].tolist():
            sums = band_reduction.root_sums_(form.m[i], BLOCK)
            total[i], error[i] = sums.total, relative_error(sums, form.rounding[i], d) + 2 * band_reduction.QUADRATURE
        return total, error, "band"
    values = torch.linalg.eigvalsh(form.m if bool(kept.all()) else form.m[kept])
    inverse = (1 / values).sum(-1).where(values.amin(-1) > 0, torch.inf)
    sums = RootSums(values.clamp(min=0.0).sqrt().sum(-1), inverse, torch.linalg.vector_norm(values, dim=-1))
    total[kept], error[kept] = sums.total, relative_error(sums, form.rounding[kept], d)
    return total, error, "eigvalsh"


def relative_error(sums: RootSums, rounding: Tensor, d: int) -> Tensor:
    """At least the relative error of sums.total, the sum of the roots of d eigenvalues of `StandardForm.m`.

    The eigenvalues move by D_i with sum D_i^2 <= eta^2, eta the Frobenius norm of all perturbations (Hoffman and
    Wielandt), so their roots by at most sum |D_i| / (sqrt(l_i) + sqrt(l_i - |D_i|)). With 4 eta below the smallest
    eigenvalue, which is at least 1 / sums.inverse, that is below 0.536 eta sqrt(sums.inverse) by Cauchy-Schwarz. Then
    C^T A C is definite too, and so is A by Sylvester's law of inertia: it need not be factored to know.
    eta: twice the measured rounding, for the backward error of C; sqrt(d) u |m|_F for the eigenvalues.
    """
    eta = 2 * rounding + d**0.5 * factor.UNIT * sums.norm
    error = 0.54 * eta * sums.inverse.sqrt() / sums.total
    return error.where(4 * eta * sums.inverse <= 1, torch.inf)


def _whole(a: Tensor, b: Tensor) -> StandardForm:
    h, scale, exponent = factor.equilibrate(b)
    lower, singular = factor.cholesky(h)
    half = factor.half_exponent(a.diagonal(dim1=-2, dim2=-1).amax(-1))
    c = lower * (scale * torch.exp2(-half)[..., None])[..., None]
    m = c.mT @ (a @ c)
    probes = factor.signs_like(a, _PROBES)
    rounding = _distance(m @ probes, c.mT @ (a @ (c @ probes)))
    return StandardForm(m, rounding.masked_fill(singular, torch.inf), exponent + half)


def _blocked(a: Tensor, b: Tensor) -> StandardForm:
    """One pair (d, d), in products that leave out the zeros of C and one triangle of m."""
    a, d = a.contiguous(), a.shape[-1]
    c, scale, exponent = factor.equilibrate(b)
    half = factor.half_exponent(a.diagonal().amax())
    if not factor.cholesky_(c, BLOCK):
        return StandardForm(c, c.new_tensor(torch.inf), exponent + half)
    # The exponents of a go to c, and m stays within range whatever the units of a are.
    c.mul_((scale * torch.exp2(-half))[:, None])
    m = torch.empty_like(c)
    blocks = list(pairwise([*range(0, d, BLOCK), d]))
    for j0, j1 in blocks:
        torch.mm(a[:, j0:], c[j0:, j0:j1], out=m[:, j0:j1])
    for i0, i1 in blocks:  # rows of a c that no later block needs make room for those of m
        m[i0:i1, :i1] = c[i0:, i0:i1].mT @ m[i0:, :i1]
    probes = factor.signs_like(a, _PROBES)
    found, cp, expected = torch.zeros_like(probes), torch.empty_like(probes), torch.empty_like(probes)
    for i0, i1 in blocks:
        torch.mm(c[i0:i1, :i1], probes[:i1], out=cp[i0:i1])
        found[i0:i1] += m[i0:i1, :i1] @ probes[:i1]
        found[:i0] += m[i0:i1, :i0].mT @ probes[i0:i1]
    cp = a @ cp
    for i0, i1 in blocks:
        torch.mm(c[i0:, i0:i1].mT, cp[i0:], out=expected[i0:i1])
    return StandardForm(m, _distance(found, expected), exponent + half)


def _distance(found: Tensor, expected: Tensor) -> Tensor:
    return ((found - expected).square().sum((-2, -1)) / _PROBES).sqrt()
