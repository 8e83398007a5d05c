"""Comparison of results: tests differences of MIR against their standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from modality_integration.metric import tables
from modality_integration.metric.differing_settings import listed, notes_on_settings
from modality_integration.metric.files import finite, json_text
from modality_integration.metric.result import MIRResult
from modality_integration.metric.standard_error import (
    chance,
    counted,
    error_cell,
    finite_jackknife,
    tells,
    why_no_error,
    with_error,
)

if TYPE_CHECKING:
    from rich.table import Table

FEW_GROUPS = 5  # with fewer, a standard error is too uncertain for a decision
SEEMS, IS = 2, 3  # thresholds in standard errors: one result seems better; is better
LONG = 20  # characters of a column header
SCHEMA = "modality-integration-rate-comparison"
VERSION = 1


@dataclass(repr=False)
class Comparison:
    """Comparison of two results: b against a.

    difference: MIR of b minus MIR of a (below 0: b's modalities are closer).
    per_layer: each layer's distance in b divided by that in a; empty if their depths differ.
    disjoint: whether the certified bounds of the arithmetic (`MIRResult.lower`, `upper`) do not overlap; None if a
    result has no bounds. It says nothing about other samples.
    error: standard error of the difference; None unless both results have a meaningful one.
    paired: whether the error is the jackknife of the group-by-group differences, which requires the same samples in
    both. Otherwise it is sqrt(error_a^2 + error_b^2), for two results on independent samples.
    notes: reasons why the two are not directly comparable or why the error is weak. names: of a and b.
    """

    a: MIRResult
    b: MIRResult
    difference: float
    per_layer: list[float]
    disjoint: bool | None
    error: float | None
    notes: list[str]
    paired: bool = False
    names: tuple[str, str] = ("A", "B")

    def __repr__(self) -> str:
        text = f"{self.names[1]} - {self.names[0]} = {with_error(self.difference, self.error)}"
        parts = [
            text,
            *(["paired"] if self.paired else []),
            *([counted(len(self.notes), "note")] if self.notes else []),
        ]
        return f"<Comparison {', '.join(parts)}>"

    def __str__(self) -> str:
        return "\n".join([self.verdict(), *(f"note: {note}" for note in self.notes)])

    @property
    def z(self) -> float | None:
        """The difference in standard errors; None if there is no error or it is only rounding."""
        if self.error is None or self.difference == 0.0:
            return None if self.error is None else 0.0
        return self.difference / self.error if tells(self.error) else None

    @property
    def groups(self) -> int:
        """The smaller number of groups of samples of the two results."""
        return min(self.a.groups, self.b.groups)

    @property
    def certain(self) -> bool:
        """Whether the two differ by three standard errors or more, each from enough groups of samples."""
        return self.z is not None and abs(self.z) >= IS and self.groups >= FEW_GROUPS

    def by_chance(self, errors: float) -> float:
        """Probability that equal results are more than `errors` standard errors apart by chance (Student's t)."""
        groups = self.a.groups, self.b.groups
        return chance(errors, max(groups[0] - 1 if self.paired else sum(groups) - 2, 1))

    def verdict(self, names: tuple[str, str] | None = None) -> str:
        """Whether the two differ, in words: from 2 standard errors one "seems" better, from 3 it "is" better.

        With errors from 5 groups each, chance alone exceeds 2 once in 12 times and 3 once in 59 (Student's t, 8 degrees
        of freedom); paired, once in 9 and once in 25 (4 degrees). With fewer groups, one only ever "seems" better;
        without an error, neither does.
        """
        return self._verdict(names or self.names, self._without_error)

    def _verdict(self, names: tuple[str, str], without_error: Callable[[tuple[str, str]], str]) -> str:
        if self.difference == 0:
            return "the same MIR"
        lower, higher = (names[1], names[0]) if self.difference < 0 else names
        if math.isinf(self.difference):
            return f"{lower}'s MIR is -inf: its modalities are indistinguishable in every layer; {higher}'s are not"
        far = f"MIR is {_far(abs(self.difference))} below {higher}'s"
        if self.z is None:
            return f"{lower}'s {far}{without_error(names)}"
        far += f", {abs(self.z):.1f} standard errors of the difference ({self.error:.2g})"
        if self.certain:
            return f"{lower} blends the modalities better: its {far}"
        if abs(self.z) >= SEEMS:
            return f"{lower} seems to blend the modalities better (more samples are needed to be sure): its {far}"
        return f"no difference beyond the standard error: {lower}'s {far}"

    def _without_error(self, names: tuple[str, str]) -> str:
        if self.error is not None:
            return ", by the same amount whichever group of samples is left out"
        reasons = {name: why_no_error(result) for name, result in zip(names, (self.a, self.b), strict=True)}
        known = [f"{name} has no standard error ({why})" for name, why in reasons.items() if why and why != "groups 0"]
        if known:
            words = f"; whether this holds for other samples is unknown: {listed(known)}"
        else:
            words = (
                "; whether this holds for other samples is unknown without a standard error of both (mir compute "
                f"--groups {FEW_GROUPS})"
            )
        return words + self._arithmetic()

    def _in_short(self, names: tuple[str, str]) -> str:
        return f", without a standard error{self._arithmetic()}"

    def _arithmetic(self) -> str:
        if self.disjoint is None:
            return ""
        if self.disjoint:
            return "; the difference exceeds arithmetic rounding, which says nothing about other samples"
        return "; the difference is within arithmetic rounding"

    def table(self, names: tuple[str, str] | None = None) -> Table:
        """A rich table: each layer's distances and their ratio (if the depths agree); MIR, its error, the difference
        and its error in the footer.
        """
        names = names or self.names
        if names[0] == names[1]:
            raise ValueError(f"names: expected two different names, got {names[0]!r} twice")
        return _table(dict(zip(names, (self.a, self.b), strict=True)), {names[1]: self})

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible dict of the difference and its test; non-finite numbers as strings."""
        return finite(
            {
                "name": self.names[1],
                "against": self.names[0],
                "difference": self.difference,
                "error": self.error,
                "z": self.z,
                "paired": self.paired,
                "disjoint": self.disjoint,
                "per_layer": self.per_layer,
                "notes": self.notes,
                "verdict": self.verdict(),
            }
        )


@dataclass(repr=False)
class Comparisons:
    """Comparison of several results with the first one, the reference.

    results: by name. against: comparison of each other result with the first, by name. neighbours: comparisons of each
    result with the next higher one, in ascending order of MIR. notes: as in `Comparison`, without duplicates.
    """

    results: dict[str, MIRResult]
    against: dict[str, Comparison]
    neighbours: list[Comparison]
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        values = ", ".join(f"{name} {with_error(r.value, r.error)}" for name, r in self.results.items())
        notes = f", {counted(len(self.notes), 'note')}" if self.notes else ""
        return f"<Comparisons {values}{notes}>"

    def __str__(self) -> str:
        return "\n".join([self.verdict(), *(f"note: {note}" for note in self.notes)])

    @property
    def ranking(self) -> str | None:
        """The names, lowest MIR first, as `a < b ~ c`: < for at least 3 standard errors between neighbours, = for equal
        values, ~ otherwise. None if any two neighbours have no error between them, or if no pair is separated by <.
        """
        if any(one.z is None and one.difference for one in self.neighbours):
            return None
        if not any(one.certain for one in self.neighbours):
            return None
        signs = [("<" if one.certain else "~") if one.difference else "=" for one in self.neighbours]
        names = [one.names[1] for one in self.neighbours]
        return " ".join(
            [self.neighbours[0].names[0], *(f"{sign} {name}" for sign, name in zip(signs, names, strict=True))]
        )

    def lines(self) -> list[str]:
        """Each result's verdict against the first; for three or more results also the ranking and the rate of false
        positives."""
        if len(self.against) == 1:
            return [one.verdict() for one in self.against.values()]
        first = next(iter(self.results))
        lines = [
            one._verdict(one.names, one._in_short) if one.difference else f"{first} and {name} have the same MIR"
            for name, one in self.against.items()
        ]
        if self.ranking:
            lines.append(
                f"lowest MIR first: {self.ranking} (<: at least {IS} standard errors apart, ~: not distinguishable)"
            )
        tested = [one for one in self.against.values() if one.z is not None]
        if len(tested) > 1:
            seems, better = (min(sum(one.by_chance(errors) for one in tested), 1.0) for errors in (SEEMS, IS))
            lines.append(
                f"{len(tested)} comparisons at once: if there were no differences, at least one would exceed {SEEMS} "
                f"standard errors by chance in up to {_percent(seems)} of such sets, and {IS} in up to "
                f"{_percent(better)}; both thresholds are meant for a single comparison"
            )
        return lines

    def verdict(self) -> str:
        """`lines`, joined by newlines."""
        return "\n".join(self.lines())

    def table(self) -> Table:
        """A rich table: a column of distances per result; MIR, the difference and their errors in the footer."""
        return _table(self.results, self.against)

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible dict; non-finite numbers as strings.

        {"schema", "version", "reference": name, "results": [{"name", "mir", "error", "lower", "upper", "per_layer"}],
        "comparisons": [see `Comparison.to_dict`], "ranking": string or null, "notes": [string], "verdict": [string]}
        """
        return finite(
            {
                "schema": SCHEMA,
                "version": VERSION,
                "reference": next(iter(self.results)),
                "results": [
                    {
                        "name": name,
                        **{"mir": r.value, "error": r.error, "lower": r.lower, "upper": r.upper},
                        "per_layer": r.per_layer,
                    }
                    for name, r in self.results.items()
                ],
                "comparisons": [one.to_dict() for one in self.against.values()],
                "ranking": self.ranking,
                "notes": self.notes,
                "verdict": self.lines(),
            }
        )

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json_text(self.to_dict(), ensure_ascii=False)


def compare(
    a: MIRResult, b: MIRResult, *, paired: bool | None = None, names: tuple[str, str] = ("A", "B")
) -> Comparison:
    """Compare b with a.

    paired: whether both have the same samples in the same groups. None decides by their settings: "chosen_samples", and
    "dealt" or, for round-robin groups, the number of "processes". ValueError for True if a result has no groups or the
    numbers of groups differ. names: names of a and b in notes and verdict.
    """
    groups = a.groups, b.groups
    if paired and (0 in groups or groups[0] != groups[1]):
        raise ValueError(
            f"paired: expected results with the same number of groups of samples, got {groups[0]} and {groups[1]}"
        )
    if names[0] == names[1]:
        raise ValueError(f"names: expected two different names, got {names[0]!r} twice")
    if paired is None:
        dealing = _dealing(a)
        paired = groups[0] == groups[1] > 0 and None not in dealing and dealing == _dealing(b)
    error = None
    if paired:
        error = paired_error(a, b)
    elif a.error is not None and b.error is not None and tells(a.error) and tells(b.error):
        error = math.hypot(a.error, b.error)
    disjoint = None
    if a.lower is not None and b.lower is not None:
        disjoint = a.upper < b.lower or b.upper < a.lower  # type: ignore[operator]
    # Two results of -inf are equal, and inf - inf is not a number.
    difference = 0.0 if a.value == b.value else b.value - a.value
    ratios = []
    if len(a.terms) == len(b.terms):
        ratios = [_ratio(y, x) for x, y in zip(a.per_layer, b.per_layer, strict=True)]
    results = dict(zip(names, (a, b), strict=True))
    notes = _notes(results, [names[1]] if paired else [])
    return Comparison(a, b, difference, ratios, disjoint, error, notes, paired, (names[0], names[1]))


def compare_several(results: Mapping[str, MIRResult], *, paired: bool | None = None) -> Comparisons:
    """Compare results, given by name, with the first of them. ValueError for fewer than two.

    paired: as in `compare`, for all of them.
    """
    if len(results) < 2:
        raise ValueError(f"results: expected two or more, got {len(results)}")
    (first, reference), *others = results.items()
    against = {name: compare(reference, r, paired=paired, names=(first, name)) for name, r in others}
    ordered = sorted(results.items(), key=lambda item: item[1].value)
    neighbours = [compare(a, b, paired=paired, names=(one, other)) for (one, a), (other, b) in pairwise(ordered)]
    notes = _notes(results, [name for name, one in against.items() if one.paired])
    return Comparisons(dict(results), against, neighbours, notes)


def paired_error(a: MIRResult, b: MIRResult) -> float | None:
    """Standard error of b's MIR minus a's if both have the same samples in the same groups.

    It is the jackknife of the differences, in which variation shared by both results cancels. None if it is not finite.
    """
    return finite_jackknife([y - x for x, y in zip(a.left_out_values, b.left_out_values, strict=True)])


def _table(results: Mapping[str, MIRResult], against: Mapping[str, Comparison]) -> Table:
    feet = {"difference": {name: _far(one.difference, "+") for name, one in against.items()}}
    errors = {name: error_cell(one.error) for name, one in against.items()}
    if any(errors.values()):
        feet["its error"] = errors
    ratios = {}
    if len(results) == 2:
        (name, one), first = *against.items(), next(iter(results))
        if one.per_layer:
            names = f"{name} / {first}"
            ratios[names if len(names) <= LONG else "ratio"] = [
                f"{ratio:.3f}" if 1e-3 <= ratio < 1e4 else f"{ratio:.4g}" for ratio in one.per_layer
            ]
    return tables.distance_table(results, feet, ratios)


def _notes(results: Mapping[str, MIRResult], paired: Sequence[str]) -> list[str]:
    """Notes on differing settings, on paired errors, and on weak or missing standard errors."""
    notes = notes_on_settings(results)
    first, *others = results
    if paired:
        both = f"{first}, {listed(paired)}"
        who = "both" if len(results) == 2 else "all" if len(paired) == len(others) else both
        one = "the error is" if len(paired) == 1 else "each error is"
        notes.append(f"the same samples in {who}: {one} computed from group-by-group differences")
    few: dict[int, list[str]] = {}
    without: dict[str, list[str]] = {}
    for name, result in results.items():
        if 1 < (groups := result.groups) < FEW_GROUPS:
            few.setdefault(groups, []).append(name)
        if len(results) > 2 and (why := why_no_error(result)) is not None:
            without.setdefault(why or f"use mir compute --groups {FEW_GROUPS}", []).append(name)
    for groups, names in few.items():
        whose = f"{names[0]}'s standard error is" if len(names) == 1 else f"the standard errors of {listed(names)} are"
        notes.append(f"{whose} based on {groups} groups of samples; use {FEW_GROUPS} or more")
    for why, names in without.items():
        notes.append(f"{listed(names)} {'has' if len(names) == 1 else 'have'} no standard error ({why})")
    return notes


def _dealing(result: MIRResult) -> tuple[Any, Any]:
    """The samples used, and the setting that their groups depend on; None if unknown.

    Groups of consecutive samples do not depend on the number of processes.
    """
    settings = result.settings
    return settings.get("chosen_samples"), settings.get("dealt") or settings.get("processes")


def _ratio(value: float, of: float) -> float:
    if of == 0.0:
        return 1.0 if value == 0.0 else math.inf
    return value / of


def _far(difference: float, sign: str = "") -> str:
    fine = 0.0 < abs(difference) < 1e-3  # four decimals would show at most one digit
    return f"{difference:{sign}.1e}" if fine else f"{difference:{sign}.4f}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"
