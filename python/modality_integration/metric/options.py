"""What a computation of MIR may be asked for: one set of options for features, streams and files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Outliers = Literal["remove", "median", "none"]
Precision = Literal["fast", "auto", "exact"]
SqrtPrecision = Literal["bfloat16", "float32", "float64"]
Sinks = Literal["report", "leave out"]
Backend = Literal["triton", "native", "eager", "reference"]  # of the token kernels; mir_kernels has it alike

MOST_GROUPS = 255  # a token's group is kept in a byte


@dataclass(frozen=True)
class MetricOptions:
    """The options of `mir` and `ModalityIntegrationRate`, which say what each means."""

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
        """Whether attention sinks are among the tokens of the distance."""
        return self.sinks == "report"

    def checked(self) -> MetricOptions:
        """Itself, once every option is one that exists."""
        from mir_kernels import _checks  # brings torch, for which `mir --help` does not wait

        _checks.choice("outliers", self.outliers, get_args(Outliers))
        _checks.choice("precision", self.precision, get_args(Precision))
        _checks.choice("sinks", self.sinks, get_args(Sinks))
        _checks.choice("sqrt_precision", self.sqrt_precision, get_args(SqrtPrecision))
        if self.hold is not None and self.hold < 2:
            raise ValueError(f"hold: takes 2 rows or more, got {self.hold}")
        if self.groups != 0 and not 2 <= self.groups <= MOST_GROUPS:
            raise ValueError(f"groups: takes 0 (no standard error) or 2 to {MOST_GROUPS}, got {self.groups}")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples: takes None or the number of samples to come, at least 1, got {self.samples}")
        return self


def require_count(name: str, value: object) -> None:
    """ValueError unless `value` is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: takes a whole number >= 1, got {value!r}")
