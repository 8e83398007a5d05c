"""Float64 reference of the matrix functions, by eigen- and singular vectors; used only when asked for by name."""

from __future__ import annotations

import torch
from torch import Tensor


def sqrtm(a: Tensor) -> Tensor:
    """V diag(sqrt(lambda)) V^T for symmetric positive semi-definite (..., d, d), float64."""
    values, vectors = torch.linalg.eigh(_symmetric(a))
    return vectors * values.clamp(min=0.0).sqrt()[..., None, :] @ vectors.mT


def inverse_sqrtm(a: Tensor) -> Tensor:
    """V diag(1/sqrt(lambda)) V^T for symmetric positive definite (..., d, d), float64."""
    values, vectors = torch.linalg.eigh(_symmetric(a))
    return vectors * values.rsqrt()[..., None, :] @ vectors.mT


def polar(m: Tensor) -> Tensor:
    """W V^T of the thin singular value decomposition W S V^T of (..., m, n), for singular values above rounding."""
    w, s, vt = torch.linalg.svd(m.double(), full_matrices=False)
    kept = s > max(m.shape[-2:]) * torch.finfo(torch.float64).eps * s[..., :1]
    return w * kept[..., None, :] @ vt


def _symmetric(a: Tensor) -> Tensor:
    return (a.double() + a.double().mT) / 2
