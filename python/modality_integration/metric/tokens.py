"""What every way of measuring MIR asks of a layer's tokens: enough of them, finite, and the scale of Eq. 2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

NORMS_TOGETHER = 4096  # rows of `sum_of_norms`


_Layers = TypeVar("_Layers", bound=Sequence)


def one_tensor_a_layer(name: str, value: _Layers) -> _Layers:
    """`value`, a list of one layer or more."""
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: takes a list with one tensor per decoder layer, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{name}: takes at least one layer, got an empty list")
    return value


def require_tokens(count: int, layer: int, modality: str) -> None:
    """A covariance with ddof 1 takes at least two tokens."""
    if count < 2:
        found = "1 token" if count else "no token"
        raise ValueError(f"layer {layer}: {found} of {modality}, and a covariance takes at least 2")


def require_finite(norms: Tensor, layer: int, modality: str, where: Callable[[int], object]) -> None:
    """Every norm is finite; `where(i)` gives the token's index for the message."""
    bad = (~torch.isfinite(norms)).nonzero()
    if len(bad):
        raise ValueError(
            f"layer {layer}: {modality} token {where(int(bad[0]))} is not finite: "
            f"its norm in float32 is {norms[bad[0]].item()}"
        )


def sum_of_norms(rows: Tensor) -> Tensor:
    """Sum of the l2 norms of rows (n, d), a float64 scalar: alpha is as exact as the distances it scales."""
    parts = [part.double().norm(dim=-1).sum() for part in rows.split(NORMS_TOGETHER)]
    return torch.stack(parts).sum()


def roundings_of_norms(count: int, d: int, *, streamed: bool = False) -> int:
    """How many roundings a term of the sum of `count` norms goes through at most: its square, the sum over d, the root;
    the sums of `sum_of_norms`, or of a stream, in which rows come in any portions, groups and processes.
    """
    sums = count + 1024 if streamed else min(count, NORMS_TOGETHER) + -(-count // NORMS_TOGETHER)
    return d + 8 + sums


def alpha_of(text_norms: Tensor, count: int, layer: int) -> float:
    """Eq. 2: the number of text tokens over the sum of their norms, before any outlier is taken out."""
    total = text_norms.item()
    if total == 0.0:
        raise ValueError(
            f"layer {layer}: every text token is zero, so alpha (Eq. 2) is undefined; normalize=False does without"
        )
    return count / total


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`, without waiting for what a GPU still has to do: from pageable memory it would."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
