"""Float64 products, factors and triangular solves, by 8-bit integers on devices with few float64 units.

Many GPUs multiply float64 at 1/64 of float32 (RTX, L4, L40S, A10), but int8 at hundreds of tera-operations per second.
On these a product is split (Ozaki, Ogita, Oishi and Rump, 2012; Ootomo, Ozaki and Yokota, 2024, for integers): each row
of X and each column of Y is scaled by a power of two to below 1/2 and written as PARTS digits of base 128, from -64 to
64. Digits are multiplied and added in int32 without rounding. All pairs of digits with the same sum of places form one
integer product; the PARTS sums are added in float64, the smallest first.

The callers' proofs rest on |fl(XY) - XY| <= gamma_k |X|_F |Y|_F, k the length of a dot product, and on its columnwise
form, |error_j| <= gamma_k |X|_F |y_j|. Split products satisfy both. With x_i, y_j the largest entries of a row and of a
column, the error of an entry is at most 0.04 k u x_i y_j for dropped digits and products, 0.07 k u x_i y_j for all sums
but the last, and 1.01 u |x_i| |y_j| for the last: together less than k u from k = 2 on (`../frechet/README.md`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from itertools import pairwise

import torch
from torch import Tensor

from mir_kernels._warnings import warn

PARTS = 9  # digits of 7 bits, 63 in all
LONGEST = 1 << 15  # of a dot product: PARTS of it times 64^2 fit int32
SMALLEST = 256  # edge below which a product stays in float64
BLOCK = 256  # columns of a factor or of a solution that stay in float64
VARIABLE = "MIR_FLOAT64"  # "native", "split", or "measured", the default
PROBE = 2048  # edge of the timed product
_forced: ContextVar[bool | None] = ContextVar("split_products", default=None)


@contextlib.contextmanager
def split_products(wanted: bool = True) -> Iterator[None]:
    """Force split products on or off in this thread, on every device, regardless of measurement and size."""
    before = _forced.set(wanted)
    try:
        yield
    finally:
        _forced.reset(before)


def is_split(device: torch.device) -> bool:
    """Whether float64 products are split on `device`: set by MIR_FLOAT64, by default measured once per CUDA device.

    Raises:
        ValueError: MIR_FLOAT64 has an unknown value.
    """
    forced = _forced.get()
    if forced is not None:
        return forced
    chosen = os.environ.get(VARIABLE, "measured")
    if chosen not in ("native", "split", "measured"):
        raise ValueError(f"{VARIABLE}: expected 'native', 'split' or 'measured', got {chosen!r}")
    if chosen != "measured" or device.type != "cuda":
        return chosen == "split"
    if torch.cuda.is_current_stream_capturing():  # timing is impossible during capture
        return False
    try:
        return _split_is_faster(device)
    except torch.OutOfMemoryError:  # not cached: the next call measures again
        return False


@functools.cache
def _split_is_faster(device: torch.device) -> bool:
    generator = torch.Generator(device).manual_seed(0)  # leaves the caller's random state alone
    x = torch.randn(PROBE, PROBE, dtype=torch.float64, device=device, generator=generator)
    native = _seconds(torch.matmul, x)
    try:
        return _seconds(split_matmul, x) < native
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as problem:  # a device or a build of torch without int8 products
        warn(f"float64 products are not split on {device} and may be slow: {problem}")
        return False


def _seconds(product: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> float:
    """Seconds of a product of x with itself, after one warm-up."""
    product(x, x)
    torch.cuda.synchronize(x.device)
    start = time.perf_counter()
    product(x, x)
    torch.cuda.synchronize(x.device)
    return time.perf_counter() - start


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """X Y for float64 (..., m, k) and (..., k, n), with the error bound in the module docstring."""
    large = min(*x.shape[-2:], y.shape[-1]) >= SMALLEST
    if x.dtype == torch.float64 and (large or _forced.get() is not None) and is_split(x.device):
        return split_matmul(x, y)
    return x @ y


def split_matmul(x: Tensor, y: Tensor) -> Tensor:
    """X Y by digits. A row or column with a non-finite value yields NaN."""
    if x.dim() > 2 or y.dim() > 2:
        batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        pairs = zip(_flat(x, batch), _flat(y, batch), strict=True)
        out = [split_matmul(one, other) for one, other in pairs]
        shape = (*batch, x.shape[-2], y.shape[-1])
        return torch.stack(out).reshape(shape) if out else x.new_zeros(shape)
    k = x.shape[-1]
    if k > LONGEST:
        return sum(split_matmul(x[:, i : i + LONGEST], y[i : i + LONGEST]) for i in range(0, k, LONGEST))  # type: ignore[return-value]
    m, n = x.shape[0], y.shape[1]
    left, left_exponent = digits(x)
    right, right_exponent = digits(y.mT)
    # One integer product per sum of two places: left's first digits against right's in reverse order.
    length = left.shape[-1]
    left, right = left.flatten(1), right.flip(1).flatten(1)
    total = None
    for sums in reversed(range(PARTS)):
        exact = torch._int_mm(left[:, : (sums + 1) * length], right[:, (PARTS - 1 - sums) * length :].mT)
        total = exact.double() if total is None else torch.add(exact, total, alpha=2.0**-7)
    assert total is not None
    scaled = times_power(total[:m, :n], left_exponent[:m, None] - 7)
    return times_power(scaled, right_exponent[None, :n] - 7)


def digits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Digits (rows', PARTS, k') int8 and exponents (rows',) float64 of x (rows, k).

    x = sum_p digit_p 128^-p 2^exponent up to 128^-PARTS / 2 times 2^exponent. Rows and columns are zero-padded to the
    sizes that int8 products require on CUDA.
    """
    rows, k = x.shape
    x = torch.nn.functional.pad(x, (0, -k % 16, 0, max(32 - rows, 0) or -rows % 16))
    largest = x.abs().amax(1) if x.shape[1] else x.new_zeros(x.shape[0])
    finite = torch.isfinite(largest)
    exponent = torch.frexp(torch.where(finite, largest, 1.0)).exponent.double() + 1
    rest = times_power(torch.where(finite[:, None], x, 0.0), -exponent[:, None])
    out = torch.empty(x.shape[0], PARTS, x.shape[1], dtype=torch.int8, device=x.device)
    for part in range(PARTS):
        rest = rest * 128
        whole = rest.round()
        out[:, part] = whole
        rest = rest - whole
    return out, torch.where(finite, exponent, torch.nan)


def in_blocks(h: Tensor) -> bool:
    """Whether h (..., d, d) is factored and solved in blocks whose updates are split products."""
    return h.shape[-1] > BLOCK and is_split(h.device)


def cholesky(h: Tensor) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factors of float64 (..., d, d) and whether they failed (bool), as torch.linalg.cholesky_ex.

    Where products are split: left-looking in blocks of columns, whose updates are split products.
    """
    d = h.shape[-1]
    if not in_blocks(h):
        lower, info = torch.linalg.cholesky_ex(h)
        return lower, info != 0
    lower = h.tril()
    failed = torch.zeros(h.shape[:-2], dtype=torch.bool, device=h.device)
    for j0, j1 in pairwise([*range(0, d, BLOCK), d]):
        if j0:
            lower[..., j0:, j0:j1] -= matmul(lower[..., j0:, :j0], lower[..., j0:j1, :j0].mT)
        block, info = torch.linalg.cholesky_ex(lower[..., j0:j1, j0:j1])
        failed |= info != 0
        lower[..., j0:j1, j0:j1] = block
        below = lower[..., j1:, j0:j1].mT
        lower[..., j1:, j0:j1] = torch.linalg.solve_triangular(block, below, upper=False).mT
    return lower.tril(), failed


def solve_right(r: Tensor, n: Tensor) -> Tensor:
    """X with X R = N for upper triangular R (..., d, d), N (..., m, d), float64; in blocks where products are split."""
    d = r.shape[-1]
    if not in_blocks(r):
        return torch.linalg.solve_triangular(r, n, upper=True, left=False)
    x = n.clone()
    for j0, j1 in pairwise([*range(0, d, BLOCK), d]):
        if j0:
            x[..., j0:j1] -= matmul(x[..., :j0], r[..., :j0, j0:j1])
        x[..., j0:j1] = torch.linalg.solve_triangular(
            r[..., j0:j1, j0:j1], x[..., j0:j1].contiguous(), upper=True, left=False
        )
    return x


def _flat(x: Tensor, batch: torch.Size) -> Tensor:
    return x.expand(*batch, *x.shape[-2:]).reshape(-1, *x.shape[-2:])


def times_power(x: Tensor, exponent: Tensor) -> Tensor:
    """x 2^exponent for integer exponents, also where 2^exponent alone would leave float64's range."""
    half = torch.floor(exponent / 2)
    return x * torch.exp2(half) * torch.exp2(exponent - half)
