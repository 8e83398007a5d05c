"""Tr((Sx Sy)^(1/2)) from the features that the covariances are of: without a covariance, where there are few rows."""

from __future__ import annotations

import torch
from torch import Tensor

from mir_kernels.ops.frechet import certificate, launch
from mir_kernels.ops.frechet.report import warn_if_missed
from mir_kernels.ops.sqrtm import factor, rounding


def trace_sqrt(
    x: Tensor, y: Tensor, precision: str, bounds: bool, backend: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The value and, with `bounds`, its lower and upper end, of features x (n, d), y (m, d) with n, m >= 2."""
    if min(x.shape[0], y.shape[0]) > x.shape[1]:
        (cov_x, exponent_x), (cov_y, exponent_y) = _covariance(x), _covariance(y)
        value, lower, upper = launch.trace_sqrt_product(cov_x, cov_y, precision, bounds, backend)
        power = torch.exp2(exponent_x + exponent_y)
        return value * power, lower * power if bounds else None, upper * power if bounds else None
    (cx, exponent_x), (cy, exponent_y) = _centred(x), _centred(y)
    power = torch.exp2(exponent_x + exponent_y) / ((x.shape[0] - 1) * (y.shape[0] - 1)) ** 0.5
    if not bounds:
        cx, cy = (c if c.shape[0] <= c.shape[1] else torch.linalg.qr(c, mode="r").R for c in (cx, cy))
    n = (cx @ cy.mT if cx.shape[0] >= cy.shape[0] else cy @ cx.mT)[None]
    solver = launch.solver(backend)
    norms, gap = solver.nuclear_norm(n, precision, backend)
    warn_if_missed("trace_sqrt_from_features", gap, precision, stacklevel=5)  # whoever called the public function
    value = norms[0] * power
    if not bounds:
        return value, None, None
    witness = solver.witness(precision, backend)(n)
    # Centring: the subtraction, and the rounding of the mean of what was centred once already.
    rows = max(x.shape[0], y.shape[0])
    slack = certificate.product_error(cx.mT, cy.mT) + 3 * rounding.gamma(rows + 4) * (
        rounding.frobenius(cx) * rounding.frobenius(cy)
    )
    lower = (certificate.nuclear_lower(n, witness)[0] - slack).clamp(min=0.0) * power * (1 - 8 * factor.UNIT)
    upper = (certificate.nuclear_upper(n, witness)[0] + slack) * power * (1 + 8 * factor.UNIT)
    return value.clamp(lower, upper), lower, upper


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Features minus their mean in float64, divided by 2^exponent so that squares neither over- nor underflow."""
    x = x.double()
    size = x.abs().amax()
    exponent = torch.where(size > 0, torch.frexp(size).exponent.double(), 0.0)
    centred = x * torch.exp2(-exponent)
    centred = centred - centred.mean(0)
    # Once more: the first mean was rounded to the size of the mean, the second to that of the deviations.
    return centred - centred.mean(0), exponent


def _covariance(x: Tensor) -> tuple[Tensor, Tensor]:
    centred, exponent = _centred(x)
    return factor.gram(centred) / (x.shape[0] - 1), exponent
