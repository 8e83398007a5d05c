"""Newton-Schulz iterations in plain torch: polar factors and coupled square roots in 16, 32 or 64 bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mir_kernels._precision import float32_products
from mir_kernels.ops.sqrtm.coefficients import PURGE, SCHULZ, Step, schedule
from mir_kernels.ops.sqrtm.float64 import times_power

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}

# SAFETY: how far rounding can push a singular value out of a step's interval. TARGET: the deviation from 1 at which a
# schedule ends, because rounding moves singular values as far. LOWER: the smallest relative singular value that
# converges within one schedule.
SAFETY = {"bfloat16": 1.1, "float16": 1.02, "float32": 1.001, "float64": 1.0 + 1e-9}
TARGET = {"bfloat16": 1e-2, "float16": 1e-3, "float32": 1e-6, "float64": 1e-14}
LOWER = {"bfloat16": 3e-4, "float16": 1e-4, "float32": 1e-7, "float64": 1e-12}


def polar(
    m: Tensor,
    precision: str,
    *,
    iterations: int | None = None,
    lower: float | None = None,
) -> Tensor:
    """The orthogonal polar factor of (batch, m, n), m >= n, in the dtype of `precision`.

    Singular values of M below `lower` times the norm bound of `normalize` come out below 1.
    """
    dtype = DTYPES[precision]
    x = normalize(m, dtype)
    with float32_products(m.device, dtype):
        for coefficients in steps_for(precision, iterations, lower):
            x = polynomial_step(x, coefficients)
    return x


def steps_for(precision: str, iterations: int | None = None, lower: float | None = None) -> tuple[Step, ...]:
    """The schedule of `precision`, cut or extended with `SCHULZ` to `iterations` steps.

    In float64, rounding lifts a zero singular value to 1e-2 at most, and `PURGE` brings it back down. In the other
    precisions rounding lifts a zero as far as the smallest singular value that should converge to 1.
    """
    steps = schedule(lower or LOWER[precision], SAFETY[precision], TARGET[precision])
    if iterations is None:
        return (*steps[:-1], PURGE, steps[-1]) if precision == "float64" else steps
    return (*steps[:iterations], *(SCHULZ,) * (iterations - len(steps)))


def polynomial_step(x: Tensor, coefficients: Step) -> Tensor:
    """a X + X (b G + c G^2), G = X^T X, for (batch, m, n); 16-bit products are accumulated in float32.

    a X is added in the accumulator of the last product: a I + b G + c G^2 rounded to bfloat16 would have negative
    eigenvalues near 0.004, which grow.
    """
    a, b, c = coefficients
    g = product(x.mT, x)
    g = product(g, g, add=g, alpha=c, beta=b)
    return product(x, g, add=x, beta=a)


def product(x: Tensor, y: Tensor, *, add: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """alpha X Y + beta add, rounded once to the dtype of X from a float32 (float64) accumulation."""
    if x.dtype in (torch.bfloat16, torch.float16) and not x.is_cuda:
        # As on a tensor core: exact products of 16-bit values, float32 sums.
        out = product(x.float(), y.float(), add=None if add is None else add.float(), alpha=alpha, beta=beta)
        return out.to(x.dtype)
    return torch.bmm(x, y) if add is None else torch.baddbmm(add, x, y, alpha=alpha, beta=beta)


def normalize(m: Tensor, dtype: torch.dtype) -> Tensor:
    """M divided by a bound of its spectral norm; zero matrices stay zero.

    The bound is between 1 and 1.02 n^(1/4) times the norm, for float64 between 1 and 1.001 n^(1/8) times it. Only the
    last division rounds, in float64 if the matrix or the iteration is float64 and in float32 otherwise.
    """
    working = torch.float64 if torch.float64 in (m.dtype, dtype) else torch.float32
    x = m.to(working)
    # Powers of two, in two steps: neither overflows for an entry near the end of the range.
    x = times_power(x, -torch.frexp(x.abs().amax((-2, -1), keepdim=True)).exponent.to(working))
    x = times_power(x, -torch.frexp(frobenius(x)).exponent.clamp(min=0).to(working))
    # |X|_2^4 <= |X^T X|_F^2, the sum of the fourth powers of the singular values; 16 bits are accurate to a percent.
    rough = x if dtype == torch.float64 else x.bfloat16()
    with float32_products(m.device, dtype):
        g = product(rough.mT, rough)
        if dtype == torch.float64:  # the eighth powers: costs less than one of the 22 steps
            bound = frobenius(product(g, g)).sqrt().sqrt() * 1.001
        else:
            bound = frobenius(g.to(working)).sqrt() * 1.02
    return (x / torch.where(bound > 0, bound, 1.0)).to(dtype)


def coupled(a: Tensor, precision: str, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Y -> A^(1/2), Z -> A^(-1/2) and |I - ZY|_F / sqrt(d) for symmetric float64 (batch, d, d), in `precision`.

    Y' = Y (3I - ZY)/2, Z' = (3I - ZY)/2 Z from Y = A/s, Z = I, s >= |A|_2 (Higham, Functions of Matrices, 6.35). A
    matrix stops at its best iterate once its residual is ten times the best: rounding dominates from there on.
    """
    dtype, working = DTYPES[precision], torch.float64 if precision == "float64" else torch.float32
    d = a.shape[-1]
    # Scaled in two steps, so that no sum overflows.
    largest = a.abs().amax((-2, -1), keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    a = a / largest
    rows = a.abs().sum(-1).amax(-1)[..., None, None]
    scale = torch.where(rows > 0, rows, 1.0)
    eye = torch.eye(d, dtype=dtype, device=a.device)
    y, z = (a / scale).to(dtype), eye.expand_as(a).clone()
    best = (y, z, torch.full_like(rows, float("inf")))
    alive = torch.ones_like(rows, dtype=torch.bool)
    with float32_products(a.device, dtype):
        for i in range(iterations + 1):
            t = product(z, y)
            residual = (frobenius(eye.to(working) - t.to(working)) / d**0.5).nan_to_num(float("inf"))
            better = alive & (residual < best[2])
            alive = alive & (residual < 10 * best[2])
            # The residual may stay near 1 for a while: until it falls, the latest iterate counts as the best.
            better = better | (alive & (residual < 1.0 + 1e-3))
            by, bz, br = best
            best = torch.where(better, y, by), torch.where(better, z, bz), torch.where(better, residual, br)
            if i == iterations:
                break
            t = (1.5 * eye - 0.5 * t).to(dtype)
            y, z = product(y, t), product(t, z)
    y, z, residual = best
    root = largest.sqrt() * scale.sqrt()
    return y.double() * root, z.double() / root, residual[..., 0, 0]


def lyapunov(x: Tensor, g: Tensor) -> Tensor:
    """S with X S + S X = G for positive semi-definite X (batch, d, d), by the sign function of [[X, G], [0, -X]].

    B' = B (3I - B^2)/2, C' = (C (3I - B^2) + B C B - B^2 C)/2 from B = X/s, C = G/s: then B -> I and C -> 2 S (Higham,
    Functions of Matrices, section 2.4, with the Newton-Schulz step of section 5.3). A small eigenvalue grows by half
    per step. A first run finds the eigenvalues that are zero to rounding: it maps the larger ones to about 1, and
    McWeeny's P' = 3 P^2 - 2 P^3 turns the result into a projector. S is zero between two such null directions; between
    a null direction and any other it solves a linear equation.
    """
    floor = 4 * max(x.shape[-1], 16) * torch.finfo(x.dtype).eps
    steps = max(1, math.ceil(math.log(1 / floor) / math.log(1.5)))
    s = x.abs().sum(-1).amax(-1)[..., None, None]
    s = torch.where(s > 0, s, 1.0)
    b = x / s
    for _ in range(steps):
        b = (3 * b - b @ (b @ b)) / 2
    p = b @ b
    for _ in range(8):
        square = p @ p
        p = 3 * square - 2 * square @ p
    null = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) - p
    filled, g = x / s + null, g / s
    beside = torch.linalg.solve(filled, p @ g @ null)
    top = filled.abs().sum(-1).amax(-1)[..., None, None]
    b, c = filled / top, p @ g @ p / top
    for _ in range(steps + 6):
        square = b @ b
        b, c = (3 * b - b @ square) / 2, (3 * c - c @ square + b @ c @ b - square @ c) / 2
    return c / 2 + beside + beside.mT


def frobenius(x: Tensor) -> Tensor:
    """|x|_F over the last two dimensions, (..., 1, 1)."""
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
