"""The precisions of Tr((AB)^(1/2)), the error each one promises, and the report of a value's error and path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from mir_kernels._warnings import warn

Precision = Literal["bfloat16", "float32", "float64"]
PRECISIONS = get_args(Precision)
TOLERANCE = {"bfloat16": 2e-3, "float32": 1e-6, "float64": 1e-8}  # promised relative error of the trace


@dataclass(frozen=True)
class TraceReport:
    """The result of `trace_sqrt_report`.

    value: float64, batch shape.  error: the relative error bound or estimate each value was accepted with.
    path: for each matrix of the flattened batch, the algorithm that computed the value.
    """

    value: Tensor
    error: Tensor
    path: tuple[str, ...]


def warn_if_missed(name: str, error: Tensor, precision: str) -> None:
    """Warn (RuntimeWarning) if an error exceeds what `precision` promises."""
    missed = error.amax().item() if error.numel() else 0.0
    if missed > TOLERANCE[precision]:
        warn(
            f"{name}: reached a relative error of {missed:.2g}, precision={precision!r} requires "
            f"{TOLERANCE[precision]:.0e}"
        )
