"""Two results side by side: whether MIR differs beyond what the choice of samples does to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modality_integration.metric import display
from modality_integration.metric.result import MIRResult
from modality_integration.metric.standard_error import finite_jackknife

if TYPE_CHECKING:
    from rich.table import Table

FEW_GROUPS = 5  # below, a standard error is too uncertain to decide by


@dataclass
class Comparison:
    """Two results: b against a.

    difference: MIR of b minus MIR of a (below 0: b's modalities are closer). per_layer: each layer's distance in b over
    that in a; empty where they have different depths. disjoint: whether the proved intervals do not overlap, None
    where a result has no bounds. error: standard error of the difference, None unless both results have one. paired:
    whether it is the jackknife of the differences, group by group, which takes the same samples in both; otherwise it
    is sqrt(error_a^2 + error_b^2), of two results with samples of their own. notes: what makes the two not comparable
    as they stand, or the error weak.
    """

    a: MIRResult
    b: MIRResult
    difference: float
    per_layer: list[float]
    disjoint: bool | None
    error: float | None
    notes: list[str]
    paired: bool = False

    @property
    def z(self) -> float | None:
        """The difference in standard errors; None without them."""
        if self.error is None or self.difference == 0.0:
            return None if self.error is None else 0.0
        return self.difference / self.error if self.error else math.copysign(math.inf, self.difference)

    def verdict(self, names: tuple[str, str] = ("A", "B")) -> str:
        """Whether the two differ, in words: from two standard errors on one "seems" better, from three it is.

        With errors from 5 groups each, two are passed by chance once in 12 times and three once in 59 (Student's t, 8
        degrees of freedom); paired, once in 9 and once in 25 (4 degrees). With fewer groups nothing is said for sure,
        and without an error nothing at all.
        """
        if self.difference == 0:
            words = "the same MIR"
        else:
            lower, higher = (names[1], names[0]) if self.difference < 0 else names
            far = f"MIR is {abs(self.difference):.4f} below {higher}'s"
            if self.z is None:
                words = (
                    f"{lower}'s {far}; whether other samples would say so too takes a standard error of both "
                    "(mir compute --groups 5)"
                )
            else:
                far += f", {abs(self.z):.1f} standard errors of the difference ({self.error:.2g})"
                if abs(self.z) >= 3 and min(map(_groups, (self.a, self.b))) >= FEW_GROUPS:
                    words = f"{lower} blends the modalities better: its {far}"
                elif abs(self.z) >= 2:
                    words = f"{lower} seems to blend the modalities better, more samples would tell: its {far}"
                else:
                    words = f"no difference beyond the standard error: {lower}'s {far}"
        if self.disjoint is not None:
            words += f" (their proved intervals {'do not overlap' if self.disjoint else 'overlap'})"
        return words

    def table(self, names: tuple[str, str] = ("A", "B")) -> Table:
        """A rich table: each layer's distances, their ratio where both are as deep, MIR at the foot."""
        columns, feet = display.distance_columns(dict(zip(names, (self.a, self.b), strict=True)))
        if self.per_layer:
            name = f"{names[1]} / {names[0]}"
            columns[name], feet[name] = [f"{ratio:.3f}" for ratio in self.per_layer], f"{self.difference:+.4f}"
        return display.layer_table(columns, feet)


def compare(a: MIRResult, b: MIRResult, *, paired: bool | None = None) -> Comparison:
    """Set b beside a.

    paired: whether both have the same samples in the same groups; None goes by their settings: "chosen_samples", and
    how they were "dealt", or among how many "processes" if in turn. ValueError where True cannot be: a result without
    groups, or with another number of them.
    """
    groups = _groups(a), _groups(b)
    if paired and (0 in groups or groups[0] != groups[1]):
        raise ValueError(f"paired: takes results with as many groups of samples, got {groups[0]} and {groups[1]}")
    if paired is None:
        dealing = _dealing(a)
        paired = groups[0] == groups[1] > 0 and None not in dealing and dealing == _dealing(b)
    if paired:
        error = paired_error(a, b)
    else:
        error = None if a.error is None or b.error is None else math.hypot(a.error, b.error)
    disjoint = None
    if a.lower is not None and b.lower is not None:
        disjoint = a.upper < b.lower or b.upper < a.lower  # type: ignore[operator]
    # Two results of -inf are equal, and inf - inf is not a number.
    difference = 0.0 if a.value == b.value else b.value - a.value
    ratios = []
    if len(a.terms) == len(b.terms):
        ratios = [_ratio(y, x) for x, y in zip(a.per_layer, b.per_layer, strict=True)]
    return Comparison(a, b, difference, ratios, disjoint, error, _differing(a, b, paired), paired)


def _differing(a: MIRResult, b: MIRResult, paired: bool) -> list[str]:
    """Notes on what is not alike in a and b, and on errors that say little."""
    known = [{"outliers": r.outliers, "normalize": r.normalize, "sinks": r.sinks, **r.settings} for r in (a, b)]
    notes = [
        f"{name.replace('_', ' ')} differs: {known[0][name]} and {known[1][name]}"
        for name in known[0]
        if name in known[1] and known[0][name] != known[1][name]
    ]
    if len(a.terms) != len(b.terms):
        notes.append(f"{len(a.terms)} and {len(b.terms)} layers: MIR sums over them, and is compared as it stands")
    if paired:
        notes.append("the same samples in both: the error is that of the differences, group by group")
    for name, result in (("A", a), ("B", b)):
        if 0 < (groups := _groups(result)) < FEW_GROUPS:
            notes.append(f"{name}'s standard error is of {groups} groups of samples: take {FEW_GROUPS} or more")
    return notes


def _dealing(result: MIRResult) -> tuple[Any, Any]:
    """Which samples there were, and what else their groups depend on; None where that is not known.

    Groups that are dealt one after the other are the same on any number of processes.
    """
    settings = result.settings
    return settings.get("chosen_samples"), settings.get("dealt") or settings.get("processes")


def _groups(result: MIRResult) -> int:
    return len(result.left_out[0]) if result.left_out else 0


def paired_error(a: MIRResult, b: MIRResult) -> float | None:
    """Standard error of b's MIR minus a's where both have the same samples in the same groups: the jackknife of the
    differences, in which what the choice of samples does to both cancels. None where it is not finite.
    """
    return finite_jackknife([y - x for x, y in zip(a.left_out_values, b.left_out_values, strict=True)])


def _ratio(value: float, of: float) -> float:
    if of == 0.0:
        return 1.0 if value == 0.0 else math.inf
    return value / of
