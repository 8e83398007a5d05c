"""Odd polynomials of degree five whose composition maps [lower, 1] to 1 fastest: the steps of `polar`.

Each is the minimax approximation of 1 on the interval left by the previous one, found by the Remez exchange algorithm.
In exact arithmetic this greedy choice yields the best composition (Amsel, Persson, Musco and Gower, The Polar Express,
2025; Nakatsukasa and Freund, SIAM Review 2016, for rational functions).
"""

from __future__ import annotations

from functools import lru_cache
from math import sqrt

Step = tuple[float, float, float]  # p(x) = a x + b x^3 + c x^5

# The limit of the minimax polynomial as the interval shrinks to a point: the error of one step is cubed (Higham,
# Functions of Matrices, section 8.3).
SCHULZ: Step = (15 / 8, -10 / 8, 3 / 8)

# Keeps 1 as `SCHULZ` does, but squares an error instead of cubing it, and maps x near 0 to 5/2 x^3.
PURGE: Step = (0.0, 5 / 2, -3 / 2)

# No step is made for a wider interval than [CUSHION, 1] times its top. The minimax polynomial of [1e-7, 1] touches 1e-6
# inside the interval: it sends singular values of order one down there, where rounding rotates their vectors
# arbitrarily. The price: the smallest grows by 4.1 per step instead of 4.25 (remedy and value of Amsel et al.).
CUSHION = 0.024


@lru_cache
def schedule(lower: float, safety: float, target: float) -> tuple[Step, ...]:
    """Steps that map singular values in [lower, 1] to within `target` of 1.

    lower: the smallest singular value that must converge to 1, relative to the bound that scaled the matrix; smaller
    ones stay below 1.  safety: every interval is widened at the top by this factor, so that a singular value pushed out
    by rounding still converges (1.1 for bfloat16, 1.001 for float32).
    target: the deviation from 1 at which the steps end.
    """
    if not 0 < lower < 1 or safety < 1 or target <= 0:
        raise ValueError(f"schedule: expected 0 < lower < 1, safety >= 1, target > 0, got {lower}, {safety}, {target}")
    steps: list[Step] = []
    low, high = lower, 1.0
    while max(1 - low, high - 1) > target and len(steps) < 64:
        step, error = minimax(max(low, CUSHION * high), high * safety)
        # Close to 1 the widening, not the interval, would dominate the error; there the limit polynomial converges.
        if limit_error(low, high) <= error:
            step, error = SCHULZ, limit_error(low, high)
        steps.append(step)
        low, high = min(evaluate(step, low), 1 - error), 1 + error
    return (*steps, *(SCHULZ,) * (not steps))


def minimax(low: float, high: float) -> tuple[Step, float]:
    """The polynomial a x + b x^3 + c x^5 closest to 1 on [low, high], and its largest error there.

    The error takes its extreme value with alternating signs at low < q < r < high, q and r the zeros of the derivative.
    """
    if high - low < 1e-5 * high:
        scale = 2 / (low + high)
        step = (SCHULZ[0] * scale, SCHULZ[1] * scale**3, SCHULZ[2] * scale**5)
        return step, max(abs(1 - evaluate(step, x)) for x in (low, high))
    q, r = (3 * low + high) / 4, (low + 3 * high) / 4
    for _ in range(100):
        a, b, c, _ = _solve([[x, x**3, x**5, sign] for x, sign in ((low, 1), (q, -1), (r, 1), (high, -1))])
        # a + 3b x^2 + 5c x^4 = 0
        root = sqrt(max(9 * b * b - 20 * a * c, 0.0))
        before, (q, r) = (q, r), (sqrt((-3 * b - root) / (10 * c)), sqrt((-3 * b + root) / (10 * c)))
        # An error close to 1 hardly changes; the positions of its extrema show whether the exchange has converged.
        if abs(q - before[0]) + abs(r - before[1]) < 1e-14 * high:
            break
    return (a, b, c), max(abs(1 - evaluate((a, b, c), x)) for x in (low, q, r, high))


def evaluate(step: Step, x: float) -> float:
    """a x + b x^3 + c x^5."""
    a, b, c = step
    return x * (a + x * x * (b + x * x * c))


def limit_error(low: float, high: float) -> float:
    """The largest deviation from 1 after `SCHULZ` on [low, high]; infinite if it would not contract."""
    if low < 0.5 or high > 1.25:
        return float("inf")
    return max(abs(1 - evaluate(SCHULZ, x)) for x in (low, high))


def _solve(rows: list[list[float]]) -> list[float]:
    """Gaussian elimination with pivoting for the 4 x 4 system rows * unknowns = 1."""
    m = [[*row, 1.0] for row in rows]
    n = len(m)
    for i in range(n):
        pivot = max(range(i, n), key=lambda k: abs(m[k][i]))
        m[i], m[pivot] = m[pivot], m[i]
        for k in range(i + 1, n):
            f = m[k][i] / m[i][i]
            m[k] = [x - f * y for x, y in zip(m[k], m[i], strict=True)]
    out = [0.0] * n
    for i in reversed(range(n)):
        out[i] = (m[i][n] - sum(m[i][j] * out[j] for j in range(i + 1, n))) / m[i][i]
    return out
