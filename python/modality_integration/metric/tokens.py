"""Checks and quantities of a layer's tokens common to all ways of measuring MIR: count, finiteness, alpha (Eq. 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

NORMS_TOGETHER = 4096  # rows per partial sum in `sum_of_norms`


_Layers = TypeVar("_Layers", bound=Sequence)


def one_tensor_a_layer(name: str, value: _Layers) -> _Layers:
    """Check that `value` is a list of at least one layer, and return it."""
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected a list with one tensor per decoder layer, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{name}: expected at least one layer, got an empty list")
    return value


def require_tokens(count: int, layer: int, modality: str) -> None:
    """Raise a ValueError for fewer than two tokens, the minimum for a covariance with ddof 1."""
    if count < 2:
        found = "1 token" if count else "no token"
        raise ValueError(f"layer {layer}: {found} of {modality}; a covariance requires at least 2")


def require_finite(norms: Tensor, layer: int, modality: str, where: Callable[[int], object]) -> None:
    """Raise a ValueError unless every norm is finite; `where(i)` returns the token's index for the message."""
    bad = (~torch.isfinite(norms)).nonzero()
    if len(bad):
        raise ValueError(
            f"layer {layer}: {modality} token {where(int(bad[0]))} is not finite: "
            f"its norm in float32 is {norms[bad[0]].item()}"
        )


def sum_of_norms(rows: Tensor) -> Tensor:
    """Sum of the l2 norms of rows (n, d), a float64 scalar, so that alpha is as accurate as the distances it scales."""
    parts = [part.double().norm(dim=-1).sum() for part in rows.split(NORMS_TOGETHER)]
    return torch.stack(parts).sum()


def roundings_of_norms(count: int, d: int, *, streamed: bool = False) -> int:
    """Maximum number of roundings of a term in the sum of `count` norms: the square, the sum over d, the root, and the
    sums of `sum_of_norms` or of a stream, where rows arrive in arbitrary chunks, groups and processes.
    """
    sums = count + 1024 if streamed else min(count, NORMS_TOGETHER) + -(-count // NORMS_TOGETHER)
    return d + 8 + sums


def alpha_of(text_norms: Tensor, count: int, layer: int) -> float:
    """Eq. 2: the number of text tokens divided by the sum of their norms, before outliers are removed."""
    total = text_norms.item()
    if total == 0.0:
        raise ValueError(
            f"layer {layer}: every text token is zero, so alpha (Eq. 2) is undefined; normalize=False needs no alpha"
        )
    return count / total


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to `device` without synchronising; a copy from pageable memory would wait for the GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
