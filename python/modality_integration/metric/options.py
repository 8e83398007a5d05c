"""Options of MIR, shared by features, streams and files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Outliers = Literal["remove", "median", "none"]
Precision = Literal["fast", "auto", "exact"]
SqrtPrecision = Literal["bfloat16", "float32", "float64"]
Sinks = Literal["report", "leave out"]
Backend = Literal["triton", "native", "eager", "reference"]  # of the token kernels, as in mir_kernels

MOST_GROUPS = 255  # a token's group is stored in one byte


@dataclass(frozen=True)
class MetricOptions:
    """The options of `mir` and `ModalityIntegrationRate`; see there for their meaning."""

    outliers: Outliers = "remove"
    normalize: bool = True
    bounds: bool = False
    precision: Precision = "auto"
    sqrt_precision: SqrtPrecision = "float32"
    hold: int | None = None
    backend: Backend | None = None
    groups: int = 0
    sinks: Sinks = "report"
    samples: int | None = None

    @property
    def counts_sinks(self) -> bool:
        """Whether attention sinks count in the distance."""
        return self.sinks == "report"

    def checked(self) -> MetricOptions:
        """The options themselves, after checking every value."""
        from mir_kernels import _checks  # imports torch, which `mir --help` need not wait for

        _checks.choice("outliers", self.outliers, get_args(Outliers))
        _checks.choice("precision", self.precision, get_args(Precision))
        _checks.choice("sinks", self.sinks, get_args(Sinks))
        _checks.choice("sqrt_precision", self.sqrt_precision, get_args(SqrtPrecision))
        if self.hold is not None and self.hold < 2:
            raise ValueError(f"hold: expected 2 rows or more, got {self.hold}")
        if self.groups != 0 and not 2 <= self.groups <= MOST_GROUPS:
            raise ValueError(f"groups: expected 0 (no standard error) or 2 to {MOST_GROUPS}, got {self.groups}")
        if self.samples is not None and self.samples < 1:
            raise ValueError(
                f"samples: expected None or the number of samples to come (at least 1), got {self.samples}"
            )
        return self


def require_count(name: str, value: object) -> None:
    """ValueError unless `value` is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}")
