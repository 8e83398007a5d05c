"""`MIRResult`: the value of MIR, its terms per layer, standard errors and bounds."""

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
    With bounds, mean_lower <= |mu_v - mu_t|^2 <= mean_upper and root_lower <= Tr(...) <= root_upper; the root's bounds
    include the errors of the traces given here. None without bounds.
    deviations: a lower bound on sum_i (sigma_vi - sigma_ti)^2 over the coordinates, which is itself a lower bound on
    Tr(Sigma_v + Sigma_t) - 2 Tr(...); 0 if both Sigma are not known to be semi-definite, as in a stream.
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

        Never less than the mean term: the covariance part is at least `deviations` and at least 0, and is set to that
        if float64 cannot resolve it.
        """
        traces = self.trace_vision + self.trace_text
        covariances = traces - 2.0 * self.trace_root
        value = self.mean + max(covariances if covariances > 1e-12 * traces else 0.0, self.deviations)
        lower, upper = self.lower, self.upper
        return value if lower is None or upper is None else min(max(value, lower), upper)

    @property
    def lower(self) -> float | None:
        """A lower bound of the distance, from those of the mean term and the covariance part; rounded outward."""
        if self.root_upper is None:
            return None
        mean = self.mean if self.mean_lower is None else self.mean_lower
        covariances = max(self._covariances(self.root_upper, -1.0), self.deviations, 0.0)
        return max(math.nextafter(mean + covariances, -math.inf), mean)

    @property
    def upper(self) -> float | None:
        """An upper bound of the distance, rounded outward."""
        if self.root_lower is None:
            return None
        mean = self.mean if self.mean_upper is None else self.mean_upper
        return math.nextafter(mean + max(self._covariances(self.root_lower, 1.0), 0.0), math.inf)

    def _covariances(self, root: float, outward: float) -> float:
        """The traces minus twice a root, plus or minus the rounding of these three operations."""
        traces = self.trace_vision + self.trace_text
        return traces - 2.0 * root + outward * 2.0**-50 * (traces + 2.0 * abs(root))


@dataclass(eq=False, repr=False)
class MIRResult(ByValue):
    """The Modality Integration Rate (Eq. 3): log10 of the sum over layers of the Fréchet distances.

    Behaves like the number `value`: float, round, int, abs, <, <=, > and >=, arithmetic with numbers and results,
    formatting (`f"{result:.3f}"`), `np.asarray(results)`, min, max, sorted. Results are equal if every field agrees; a
    number equals a result of that value. Computed results are `MIRTensor`s, which are also torch.Tensors and return
    tensors from arithmetic instead of floats; results read from JSON need no torch.

    Every list has one entry per layer, in order; {"vision": [...], "text": [...]} are token counts.

    terms: the terms of the distance. alpha: the text-centric scale (Eq. 2), 1 without normalisation.
    kept, removed: tokens counted, and tokens removed by the outlier rule (with outliers="median": replaced).
    outliers, normalize: the settings. notes: sentences on anything inexact or unusual; normally empty.
    missed: kept tokens that the rule would have removed had they not been counted already; 0 means exact.
    left_out: the layer's distances with each group of samples left out, for the standard error; None without groups.
    sinks: the setting. massive: kept tokens of massive activation in the layer; with sinks="leave out", tokens left out
    as sinks. sink_positions: {"vision": {position: count}, "text": ...}, the number of sinks at each sequence position,
    largest count first; empty if there are none or positions are unknown.
    without_sinks: the layer's distance without sinks; None if there are none, if they are left out already, or if it is
    unknown.
    settings: other settings that the value depends on, as written by `mir compute` (model, data, prompt): strings,
    numbers, True, False or None by name; may be empty.

    As JSON, version 5: {"schema": "modality-integration-rate", "version": 5, "mir": number, "error", "lower", "upper",
    "mir_without_sinks": number or null, "outliers": "remove" | "median" | "none", "normalize": bool, "sinks":
    "report" | "leave out", "sink_positions": {"vision": {position: int}, "text": likewise}, "notes": [string],
    "settings": object, "layers": [{"layer": 1.., "distance", "alpha", "mean", "trace_vision", "trace_text",
    "trace_root", "deviations": number, "error", "mean_lower", "mean_upper", "root_lower", "root_upper",
    "without_sinks": number or null, "kept": {"vision": int, "text": int}, "removed", "missed", "massive": likewise,
    "left_out": [number] or null}]}.
    Non-finite numbers are the strings "inf" and "-inf". "mir", "error", "lower", "upper", "mir_without_sinks" and
    "distance" are derived from the rest, for convenience. Readers reject any other version; the version changes
    whenever the keys do.
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
        """The number of groups of samples behind the standard error; 0 if there is none."""
        return len(self.left_out[0]) if self.left_out else 0

    @property
    def per_layer(self) -> list[float]:
        """The Fréchet distance of each layer."""
        return [terms.distance for terms in self.terms]

    @property
    def value(self) -> float:
        """MIR; -inf if every layer's distance is 0."""
        return mir_value(self.per_layer)

    @property
    def error(self) -> float | None:
        """Standard error of `value` over the choice of samples (see `jackknife`); None without groups of samples, or if
        it is not finite.
        """
        return None if self.left_out is None else finite_jackknife(self.left_out_values)

    @property
    def left_out_values(self) -> list[float]:
        """MIR with each group of samples left out; empty without groups."""
        return [mir_value(layers) for layers in zip(*(self.left_out or []), strict=True)]

    @property
    def layer_errors(self) -> list[float] | None:
        """The standard error of each layer's distance; None without groups."""
        return None if self.left_out is None else [jackknife(distances) for distances in self.left_out]

    @property
    def lower(self) -> float | None:
        """Certified lower bound of MIR; None unless bounds were requested.

        It holds for the exact features in memory, or for a stream's means, covariances and norms as accumulated.
        """
        bounds = [terms.lower for terms in self.terms]
        return None if None in bounds else _outward(bounds, -math.inf)  # type: ignore[arg-type]

    @property
    def upper(self) -> float | None:
        """Certified upper bound of MIR; see `lower`."""
        bounds = [terms.upper for terms in self.terms]
        return None if None in bounds else _outward(bounds, math.inf)  # type: ignore[arg-type]

    @property
    def value_without_sinks(self) -> float | None:
        """MIR without attention sinks, as with sinks="leave out"; None if `without_sinks` is None."""
        return None if self.without_sinks is None else mir_value(self.without_sinks)

    @property
    def total_missed(self) -> int:
        """Sum of `missed` over all layers and both modalities; 0 means exact."""
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
        """The result as JSON (see the class), written atomically to `path` if one is given."""
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
        """Read a result written by `to_json`, from a path or from the JSON text. ValueError for anything else."""
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
                raise ValueError("layers: the derived values include NaN")
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"{name} is an incomplete MIR result: {error!r}") from error
        return result

    def table(self) -> Table:
        """A rich table: one row per layer with its distance, terms (Eq. 3) and token counts; MIR in the footer.

        If attention sinks count, the last column has the distances without them. On a narrow console, columns are
        dropped and named below the table; `to_json` has them all.
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
        """Draw the distance of each layer with its standard error, as in Figure 2 (right) of the paper.

        If attention sinks count, the distance without them is a thin second line. path: an image file whose suffix sets
        the format (.pdf, .svg, .png and more; ValueError for others); returns the file. Without a path, returns
        matplotlib's figure and axes. ax: the axes to draw into.
        """
        curves = {figures.mir_label(self): self}
        if path is None:
            return figures.layer_figure(curves, ax)
        if ax is not None:
            raise ValueError("plot: expected either path or ax, got both")
        return figures.layer_curves(curves, path)


def mir_value(distances: Iterable[float]) -> float:
    """log10 of the sum of the layers' distances (Eq. 3); -inf if all are 0."""
    total = math.fsum(distances)
    return math.log10(total) if total > 0.0 else -math.inf


def _outward(distances: Iterable[float], towards: float) -> float:
    """`mir_value`, rounded towards -inf or inf."""
    # The sum is rounded outward first: near 1, its rounding is much larger than a unit in the last place of its
    # logarithm. log10 itself is accurate to one or two units in the last place.
    value = mir_value([math.nextafter(math.fsum(distances), towards)])
    return math.nextafter(math.nextafter(value, towards), towards)
