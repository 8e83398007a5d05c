"""`MIRResult`: the value of MIR, its terms layer by layer, standard errors and bounds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from modality_integration.metric import MODALITIES, figures, result_json, tables
from modality_integration.metric.by_value import ByValue
from modality_integration.metric.files import write_text
from modality_integration.metric.standard_error import (
    arithmetic,
    counted,
    finite_jackknife,
    jackknife,
    missing_error,
    why_no_error,
    with_error,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table


@dataclass
class LayerTerms:
    """The terms of one layer's Fréchet distance (Eq. 3), after scaling by alpha.

    mean: |mu_v - mu_t|^2; trace_vision, trace_text: Tr Sigma; trace_root: Tr((Sigma_v Sigma_t)^(1/2)).
    Where bounds were asked for, mean_lower <= |mu_v - mu_t|^2 <= mean_upper, and root_lower <= Tr(...) <= root_upper
    with what the traces as given here are off by in them; None otherwise.
    deviations: at most sum_i (sigma_vi - sigma_ti)^2 over the coordinates, which Tr(Sigma_v + Sigma_t) less twice the
    root is no less than; 0 where it is not known that both Sigma, of a stream, are semi-definite.
    """

    mean: float
    trace_vision: float
    trace_text: float
    trace_root: float
    root_lower: float | None = None
    root_upper: float | None = None
    mean_lower: float | None = None
    mean_upper: float | None = None
    deviations: float = 0.0

    @property
    def distance(self) -> float:
        """mean + trace_vision + trace_text - 2 trace_root.

        Never less than the mean's term: what the covariances add is no less than `deviations`, nor than 0, and below
        what float64 resolves of it that is what is known.
        """
        traces = self.trace_vision + self.trace_text
        covariances = traces - 2.0 * self.trace_root
        value = self.mean + max(covariances if covariances > 1e-12 * traces else 0.0, self.deviations)
        lower, upper = self.lower, self.upper
        return value if lower is None or upper is None else min(max(value, lower), upper)

    @property
    def lower(self) -> float | None:
        """A lower bound of the distance: of the mean's term, and what the covariances add; rounded outward."""
        if self.root_upper is None:
            return None
        mean = self.mean if self.mean_lower is None else self.mean_lower
        covariances = max(self._covariances(self.root_upper, -1.0), self.deviations, 0.0)
        return max(math.nextafter(mean + covariances, -math.inf), mean)

    @property
    def upper(self) -> float | None:
        """An upper bound of the distance, likewise."""
        if self.root_lower is None:
            return None
        mean = self.mean if self.mean_upper is None else self.mean_upper
        return math.nextafter(mean + max(self._covariances(self.root_lower, 1.0), 0.0), math.inf)

    def _covariances(self, root: float, outward: float) -> float:
        """The traces less twice a root, with the rounding of these three operations."""
        traces = self.trace_vision + self.trace_text
        return traces - 2.0 * root + outward * 2.0**-50 * (traces + 2.0 * abs(root))


@dataclass(eq=False, repr=False)
class MIRResult(ByValue):
    """The Modality Integration Rate (Eq. 3): log10 of the sum over layers of the Fréchet distances.

    It does what a number does, by `value`: float, round, int, abs, <, <=, > and >=, arithmetic with numbers and
    results, formats (`f"{result:.3f}"`), `np.asarray(results)`, min, max, sorted. Results are equal where every field
    agrees; a number is equal to a result of that value. What is computed here is a `MIRTensor`, which is a torch.Tensor
    as well, and gives tensors in arithmetic where this gives floats; what is read from JSON needs no torch.

    Every list has one entry per layer, in order; {"vision": [...], "text": [...]} is a count of tokens.

    terms: the distance's terms. alpha: the text-centric scale (Eq. 2), 1 without normalisation.
    kept, removed: tokens counted, and tokens that the outlier rule left out (with outliers="median": replaced).
    outliers, normalize: the settings. notes: sentences on anything that was not exact or not ordinary; empty when all
    is well. missed: tokens among those kept that the rule would have left out, had the stream not passed already; 0 is
    exact. left_out: the layer's distance with each group of samples left out, for the standard error; None without.
    sinks: the setting. massive: counts of tokens of massive activation in that layer among those kept; with
    sinks="leave out", among those left out as sinks. sink_positions: {"vision": {position: count}, "text": ...}, where
    in their sequences how many sinks stand, most first; empty where there are none or positions are not known.
    without_sinks: the layer's distance without any sink; None where there are none, where they are left out already,
    or where it is not known.
    settings: what else the value depends on, as `mir compute` writes it (model, data, prompt): by name a word, number,
    True, False or None; may be empty.

    As JSON, version 5: {"schema": "modality-integration-rate", "version": 5, "mir": number, "error", "lower", "upper",
    "mir_without_sinks": number or null, "outliers": "remove" | "median" | "none", "normalize": bool, "sinks":
    "report" | "leave out", "sink_positions": {"vision": {position: int}, "text": likewise}, "notes": [string],
    "settings": object, "layers": [{"layer": 1.., "distance", "alpha", "mean", "trace_vision", "trace_text",
    "trace_root", "deviations": number, "error", "mean_lower", "mean_upper", "root_lower", "root_upper",
    "without_sinks": number or null, "kept": {"vision": int, "text": int}, "removed", "missed", "massive": likewise,
    "left_out": [number] or null}]}.
    A number that is not finite is the string "inf" or "-inf". "mir", "error", "lower", "upper", "mir_without_sinks" and
    "distance" follow from the rest and are written for readers. Readers refuse any other version; a new version is one
    whose keys change.
    """

    terms: list[LayerTerms]
    alpha: list[float]
    kept: dict[str, list[int]]
    removed: dict[str, list[int]]
    outliers: str = "remove"
    normalize: bool = True
    notes: list[str] = field(default_factory=list)
    missed: dict[str, list[int]] = field(default_factory=dict)
    left_out: list[list[float]] | None = None
    sinks: str = "report"
    massive: dict[str, list[int]] = field(default_factory=dict)
    sink_positions: dict[str, dict[int, int]] = field(default_factory=dict)
    without_sinks: list[float] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.missed = {m: self.missed.get(m, [0] * len(self.terms)) for m in MODALITIES}
        self.massive = {m: self.massive.get(m, [0] * len(self.terms)) for m in MODALITIES}
        self.sink_positions = {m: self.sink_positions.get(m, {}) for m in MODALITIES}

    @property
    def groups(self) -> int:
        """How many groups of samples the standard error is of; 0 without."""
        return len(self.left_out[0]) if self.left_out else 0

    @property
    def per_layer(self) -> list[float]:
        """The Fréchet distance of each layer."""
        return [terms.distance for terms in self.terms]

    @property
    def value(self) -> float:
        """MIR; -inf where every layer's distance is 0."""
        return mir_value(self.per_layer)

    @property
    def error(self) -> float | None:
        """Standard error of `value` over the choice of samples (see `jackknife`); None without groups of samples, or
        where it is not finite.
        """
        return None if self.left_out is None else finite_jackknife(self.left_out_values)

    @property
    def left_out_values(self) -> list[float]:
        """MIR with each group of samples left out; empty without groups."""
        return [mir_value(layers) for layers in zip(*(self.left_out or []), strict=True)]

    @property
    def layer_errors(self) -> list[float] | None:
        """The standard error of each layer's distance, as `error`."""
        return None if self.left_out is None else [jackknife(distances) for distances in self.left_out]

    @property
    def lower(self) -> float | None:
        """MIR is at least this; None unless bounds were asked for.

        Of features in memory as they are; of a stream, of its means, covariances and norms as accumulated.
        """
        bounds = [terms.lower for terms in self.terms]
        return None if None in bounds else _outward(bounds, -math.inf)  # type: ignore[arg-type]

    @property
    def upper(self) -> float | None:
        """MIR is at most this, as `lower`."""
        bounds = [terms.upper for terms in self.terms]
        return None if None in bounds else _outward(bounds, math.inf)  # type: ignore[arg-type]

    @property
    def value_without_sinks(self) -> float | None:
        """MIR without attention sinks, as sinks="leave out" has it; None as `without_sinks`."""
        return None if self.without_sinks is None else mir_value(self.without_sinks)

    @property
    def total_missed(self) -> int:
        """`missed` over all layers and both modalities; 0 is exact."""
        return sum(map(sum, self.missed.values()))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MIRResult):
            return self.value == other if isinstance(other, Real) else NotImplemented
        return all(getattr(self, part.name) == getattr(other, part.name) for part in fields(self))

    def __hash__(self) -> int:
        return hash(self.value)  # equal results have equal terms

    def __format__(self, spec: str) -> str:
        return format(self.value, spec) if spec else str(self)

    def __repr__(self) -> str:
        parts = [f"{type(self).__name__} {with_error(self.value, self.error)}", counted(len(self.terms), "layer")]
        return f"<{', '.join([*parts, *([counted(len(self.notes), 'note')] if self.notes else [])])}>"

    def __str__(self) -> str:
        why = why_no_error(self)
        value = with_error(self.value, self.error) + (f" ({missing_error(self)})" if why else "")
        text = f"MIR {value} over {len(self.terms)} layers"
        if accuracy := arithmetic(self):
            text += f", {accuracy}"
        return "\n".join([text, *(f"note: {note}" for note in self.notes)])

    def to_json(self, path: str | Path | None = None) -> str:
        """The result as JSON (see the class), written to `path` if one is given: whole, or not at all."""
        layers = []
        errors = self.layer_errors
        for index, terms in enumerate(self.terms):
            layer: dict[str, Any] = {"layer": index + 1, "distance": terms.distance}
            layer |= {"error": errors[index] if errors else None, "alpha": self.alpha[index], **asdict(terms)}
            layer |= {n: {m: getattr(self, n)[m][index] for m in MODALITIES} for n in result_json.COUNTS}
            layer |= {"without_sinks": self.without_sinks[index] if self.without_sinks else None}
            layers.append(layer | {"left_out": self.left_out[index] if self.left_out else None})
        text = result_json.encode(
            {
                "mir": self.value,
                "error": self.error,
                "lower": self.lower,
                "upper": self.upper,
                "mir_without_sinks": self.value_without_sinks,
                "outliers": self.outliers,
                "normalize": self.normalize,
                "sinks": self.sinks,
                "sink_positions": {m: {str(k): n for k, n in self.sink_positions[m].items()} for m in MODALITIES},
                "notes": self.notes,
                "settings": self.settings,
                "layers": layers,
            }
        )
        if path is not None:
            write_text(Path(path), text)
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> MIRResult:
        """Read what `to_json` wrote: a path, or the JSON text itself. ValueError if it is something else."""
        document, name = result_json.parse(source)
        try:
            fields = result_json.fields(document)
            result = cls(terms=[LayerTerms(**terms) for terms in fields.pop("terms")], **fields)
            derived = (
                *result.per_layer,
                result.value,
                result.lower,
                result.upper,
                result.error,
                result.value_without_sinks,
            )
            if any(value is not None and math.isnan(value) for value in derived):
                raise ValueError("layers: their terms do not add up to a number")
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"{name} is an incomplete MIR result: {error!r}") from error
        return result

    def table(self) -> Table:
        """A rich table: one row per layer with its distance and terms (Eq. 3), tokens kept and out; MIR at the foot.

        Where attention sinks count, the distances without them are the last column. A narrow console leaves columns out
        and says which; `to_json` has them all.
        """
        names = ("distance", "mean", "Tr v", "Tr t", "Tr root", "alpha", *(f"{m} -out" for m in MODALITIES))
        columns: dict[str, list[str]] = {name: [] for name in names}
        for index, terms in enumerate(self.terms):
            numbers = (terms.mean, terms.trace_vision, terms.trace_text, terms.trace_root, self.alpha[index])
            counts = [f"{self.kept[m][index]} -{self.removed[m][index]}" for m in MODALITIES]
            cells = (tables.distance_cell(terms.distance), *(f"{number:.3g}" for number in numbers), *counts)
            for column, cell in zip(columns.values(), cells, strict=True):
                column.append(cell)
        feet = {"distance": f"{self.value:.4f}"}
        expendable = ["Tr root", "Tr t", "Tr v", "alpha", "mean", "text -out", "vision -out", "no sinks"]
        if self.without_sinks is not None:
            columns["no sinks"] = [tables.distance_cell(distance) for distance in self.without_sinks]
            feet["no sinks"] = f"{self.value_without_sinks:.4f}"
        return tables.layer_table(columns, {"MIR": feet}, expendable, "mir.json has all terms")

    @overload
    def plot(self, path: str | Path) -> Path: ...

    @overload
    def plot(self, path: None = None, ax: Axes | None = None) -> tuple[Figure, Axes]: ...

    def plot(self, path: str | Path | None = None, ax: Axes | None = None) -> Path | tuple[Figure, Axes]:
        """Draw the distance of each layer with its standard error, as the right of the paper's Figure 2.

        Where attention sinks count, the distance without them is a thin second line. path: an image file, whose suffix
        is the format (.pdf, .svg, .png and more; ValueError for another); gives it. Without: gives matplotlib's figure
        and axes. ax: the axes to draw into.
        """
        curves = {figures.mir_label(self): self}
        if path is None:
            return figures.layer_figure(curves, ax)
        if ax is not None:
            raise ValueError("plot: takes path or ax, got both")
        return figures.layer_curves(curves, path)


def mir_value(distances: Iterable[float]) -> float:
    """log10 of the sum of the layers' distances (Eq. 3); -inf where all are 0."""
    total = math.fsum(distances)
    return math.log10(total) if total > 0.0 else -math.inf


def _outward(distances: Iterable[float], towards: float) -> float:
    """`mir_value`, rounded towards -inf or inf."""
    # The sum is rounded once, and where it is next to 1 its logarithm is far smaller than that. log10 itself is right
    # to a unit in the last place, or to two.
    value = mir_value([math.nextafter(math.fsum(distances), towards)])
    return math.nextafter(math.nextafter(value, towards), towards)
