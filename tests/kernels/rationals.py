"""Exact moments, roots and distances of features and matrices: in rationals, then with many digits."""

from __future__ import annotations

from fractions import Fraction

import mpmath
from torch import Tensor

DIGITS = 120
Matrix = list[list[Fraction]]


def exact(x: Tensor) -> Matrix:
    """The entries of x (n, d)."""
    return [[Fraction(entry) for entry in row] for row in x.double().tolist()]


def moments(x: Tensor) -> tuple[list[Fraction], Matrix]:
    """Mean and covariance (ddof 1) of the rows of x (n, d)."""
    rows = exact(x)
    n, columns = len(rows), list(zip(*rows, strict=True))
    mean = [sum(column) / n for column in columns]
    centred = [[entry - m for entry in column] for column, m in zip(columns, mean, strict=True)]
    return mean, [[_dot(a, b) / (n - 1) for b in centred] for a in centred]


def digits(number: Fraction) -> mpmath.mpf:
    """`number` to DIGITS digits, which the caller has set."""
    return mpmath.mpf(number.numerator) / number.denominator


def semidefinite(a: Matrix) -> bool:
    """Whether the symmetric matrix a has no negative eigenvalue."""
    return _pivots(a) is not None


def root(a: Matrix, b: Matrix) -> mpmath.mpf:
    """Tr((AB)^(1/2)) of positive semi-definite matrices."""
    found = _pivots(a)
    assert found is not None
    factor, pivots = found
    d, sizes = range(len(a)), [mpmath.sqrt(digits(pivot)) for pivot in pivots]
    # With A = L P L^T the eigenvalues of AB are those of P^(1/2) L^T B L P^(1/2).
    columns = [[factor[k][j] for k in d] for j in d]
    inner = [[_dot(columns[i], [_dot(b[k], columns[j]) for k in d]) for j in d] for i in d]
    form = mpmath.matrix([[sizes[i] * digits(inner[i][j]) * sizes[j] for j in d] for i in d])
    values = mpmath.eigsy((form + form.T) / 2, eigvals_only=True)
    return mpmath.fsum(mpmath.sqrt(max(value, mpmath.mpf(0))) for value in values)


def of_covariances(a: Matrix, b: Matrix) -> mpmath.mpf:
    """Tr(A + B - 2 (AB)^(1/2)); 0 if it is only rounding at DIGITS digits."""
    traces = digits(sum(a[i][i] + b[i][i] for i in range(len(a))))
    found = traces - 2 * root(a, b)
    return found if found > traces * mpmath.mpf(10) ** (30 - DIGITS) else mpmath.mpf(0)


def of_means(x: list[Fraction], y: list[Fraction]) -> mpmath.mpf:
    """|x - y|^2."""
    return digits(sum(((a - b) ** 2 for a, b in zip(x, y, strict=True)), Fraction(0)))


def mean_norm(x: Tensor) -> mpmath.mpf:
    """The mean of the l2 norms of the rows of x (n, d)."""
    return mpmath.fsum(mpmath.sqrt(digits(_dot(row, row))) for row in exact(x)) / len(x)


def _dot(x: list[Fraction], y: list[Fraction]) -> Fraction:
    return sum((a * b for a, b in zip(x, y, strict=True)), Fraction(0))


def _pivots(a: Matrix) -> tuple[Matrix, list[Fraction]] | None:
    """Unit lower triangular L and pivots P with L diag(P) L^T = A; None if A is indefinite."""
    d = len(a)
    rest, lower = [row[:] for row in a], [[Fraction(i == j) for j in range(d)] for i in range(d)]
    for j in range(d):
        below = range(j + 1, d)
        if rest[j][j] < 0 or (rest[j][j] == 0 and any(rest[i][j] for i in below)):
            return None
        for i in below:
            lower[i][j] = rest[i][j] / rest[j][j] if rest[j][j] else Fraction(0)
        for i in below:
            for k in below:
                rest[i][k] -= lower[i][j] * lower[k][j] * rest[j][j]
    return lower, [rest[j][j] for j in range(d)]
