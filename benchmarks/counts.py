"""Minimal bytes and operations of every benchmarked job, shared by the benchmarks and the roofline.

Bytes: every input is read once, every output written once. Operations: a multiplication and an addition count as two; a
symmetric product counts one triangle.
"""

from __future__ import annotations

from typing import NamedTuple


class Count(NamedTuple):
    """The minimum of a job."""

    bytes: int
    flops: int

    def __add__(self, other: Count) -> Count:  # type: ignore[override]
        return Count(self.bytes + other.bytes, self.flops + other.flops)

    def times(self, n: int) -> Count:
        return Count(n * self.bytes, n * self.flops)


def masked_rows(rows: int, vision: int, d: int, per_vision: int, per_text: int, element: int = 2) -> Count:
    """Given numbers of passes over the vision rows and the text rows of (rows, d); arithmetic does not count."""
    return Count(element * d * (per_vision * vision + per_text * (rows - vision)), 0)


def moca_forward_in_place(rows: int, vision: int, d: int) -> Count:
    """Read and write x in vision rows."""
    return masked_rows(rows, vision, d, 2, 0)


def moca_forward(rows: int, vision: int, d: int) -> Count:
    """Read x and write a new tensor."""
    return masked_rows(rows, vision, d, 2, 2)


def moca_backward(rows: int, vision: int, d: int) -> Count:
    """Read grad, write dx; x is read in vision rows only."""
    return masked_rows(rows, vision, d, 3, 2)


def add_moca_rms_norm_forward(rows: int, vision: int, d: int) -> Count:
    """Read x and residual, write h and out."""
    return masked_rows(rows, vision, d, 4, 4)


def add_moca_rms_norm_backward(rows: int, vision: int, d: int) -> Count:
    """Read grad_out, grad_h and h, write dx; x and residual are read in vision rows only."""
    return masked_rows(rows, vision, d, 6, 4)


def token_norms(n: int, d: int) -> Count:
    """Read bf16 tokens, write float32 norms."""
    return Count(2 * n * d + 4 * n, 2 * n * d)


def covariance(n: int, d: int) -> Count:
    """Read bf16 tokens once, read and write one triangle of float64; one triangle of the product."""
    return Count(2 * n * d + 8 * d * (d + 1), n * d * (d + 1))


def trace_sqrt(d: int) -> Count:
    """Read two float64 matrices; a Cholesky factor of each and the product of the triangles, d^3/3 each; singular
    values of that product by bidiagonalisation, 8 d^3/3 (Golub and Van Loan, Matrix Computations, 8.6)."""
    return Count(16 * d * d, 11 * d**3 // 3)


def trace_sqrt_cpu(d: int) -> Count:
    """The same if one of the two is definite: its Cholesky factor, d^3/3, the standard form C^T A C, d^3, and the
    reduction to a band or a tridiagonal matrix, 4 d^3/3 (Golub and Van Loan, 8.3 and 8.7)."""
    return Count(16 * d * d, 8 * d**3 // 3)


def trace_sqrt_on(device: str, d: int) -> Count:
    """`trace_sqrt_cpu` on a "cpu", `trace_sqrt` on a GPU."""
    return trace_sqrt_cpu(d) if device == "cpu" else trace_sqrt(d)


def trace_factors(d: int) -> Count:
    """Read two float64 matrices, write N; a Cholesky factor of each and the product of the triangles, d^3/3 twice."""
    return Count(24 * d * d, 4 * d**3 // 3)


def trace_certificate(d: int) -> Count:
    """Float64 work to turn an iterated polar factor U of N into a trace with its error (frechet/certificate.py): the
    last step U (3 I - U^T U)/2, P = U^T N, N R^-1 and X R with R^T R = P, and two Cholesky factors. Symmetric or
    triangular operands count half. U is read in float32, six float64 matrices are written."""
    return Count((4 + 6 * 8) * d * d, (1 + 2 + 2 + 1 + 1) * d**3 + 2 * d**3 // 3)


SPLIT_PARTS, SPLIT_BLOCK = 9, 256  # PARTS and BLOCK of mir_kernels/ops/sqrtm/float64.py


def trace_split(d: int) -> Count:
    """The int8 work of factors and certificate if float64 products are split, except for the factor that proves a norm.
    Bytes of the integers and their float64 sums: seven products of d x d, PARTS passes each over digits, int32 and
    sums."""
    wide = trace_factors(d).flops + trace_certificate(d).flops - d**3 // 3
    passes = 7 * SPLIT_PARTS * (2 + 4 + 16) * d * d
    return Count(passes, SPLIT_PARTS * (SPLIT_PARTS + 1) // 2 * wide)


def trace_unsplit(d: int) -> Count:
    """Work that stays in float64 if products are split: the Cholesky factor that proves the norm of the polar factor,
    and the triangular solves in each block, d^2/2 per column for three Cholesky factors and d^2 for N R^-1."""
    return Count(5 * 16 * d * d, d**3 // 3 + 5 * SPLIT_BLOCK * d * d // 2)


def polar_step(d: int, element: int = 2) -> Count:
    """One Newton-Schulz step of degree 5 on (d, d): two symmetric products and a full one; every operand once."""
    return Count(7 * element * d * d, 2 * d * d * (d + 1) + 2 * d**3)


def mir_tokens(layers: int, n: int, d: int) -> Count:
    """One pass over the hidden states of all layers, n tokens each: norms and covariances from a single read."""
    return Count(2 * n * d, n * d * (d + 1) + 2 * n * d).times(layers)
