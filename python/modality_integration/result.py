"""What a computation of MIR gives: the value, each layer's terms, what was left out, and what was not exact."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

MODALITIES = ("vision", "text")
_COUNTS = ("kept", "removed", "missed")  # the last one since version 2 of the schema
SCHEMA = "modality-integration-rate"
VERSION = 3


@dataclass
class LayerTerms:
    """The terms of one layer's Fréchet distance (Eq. 3), after scaling by alpha.

    mean: |mu_v - mu_t|^2; trace_vision, trace_text: Tr Sigma; trace_root: Tr((Sigma_v Sigma_t)^(1/2)), with
    root_lower <= truth <= root_upper where bounds were asked for, None otherwise.
    """

    mean: float
    trace_vision: float
    trace_text: float
    trace_root: float
    root_lower: float | None = None
    root_upper: float | None = None

    @property
    def distance(self) -> float:
        """mean + trace_vision + trace_text - 2 trace_root, never negative: below what float64 resolves it is 0."""
        value = self.mean + self.trace_vision + self.trace_text - 2.0 * self.trace_root
        return value if value > self._resolution else 0.0

    @property
    def lower(self) -> float | None:
        """A lower bound of the distance, from the upper bound of the root, rounded outward."""
        if self.root_upper is None:
            return None
        value = self.mean + self.trace_vision + self.trace_text - 2.0 * self.root_upper
        return max(value - self._resolution, 0.0)

    @property
    def upper(self) -> float | None:
        """An upper bound of the distance, from the lower bound of the root, rounded outward."""
        if self.root_lower is None:
            return None
        value = self.mean + self.trace_vision + self.trace_text - 2.0 * self.root_lower
        return max(value, 0.0) + self._resolution

    @property
    def _resolution(self) -> float:
        # The terms are sums over d of float64 numbers and cancel: what is left of them below this is rounding.
        return 1e-12 * (self.mean + self.trace_vision + self.trace_text)


@dataclass
class MIRResult:
    """The Modality Integration Rate (Eq. 3): log10 of the sum over layers of the Fréchet distances.

    Every list has one entry per layer, in order; {"vision": [...], "text": [...]} is a count of tokens.

    terms: the distance's terms. alpha: the text-centric scale (Eq. 2), 1 without normalisation.
    kept, removed: tokens counted, and tokens that the outlier rule left out (with outliers="median": replaced).
    outliers, normalize: the settings. notes: sentences on anything that was not exact or not ordinary; empty when all
    is well. missed: tokens among those kept that the rule would have left out, had the stream not passed already; 0 is
    exact. left_out: the layer's distance with each group of samples left out, for the standard error; None without.
    settings: what else the value depends on, as `mir compute` writes it (model, data, prompt): by name a word, number,
    True, False or None; may be empty.

    As JSON, version 3: {"schema": "modality-integration-rate", "version": 3, "mir": number, "error", "lower", "upper":
    number or null, "outliers": "remove" | "median" | "none", "normalize": bool, "notes": [string], "settings": object,
    "layers": [{"layer": 1.., "distance", "alpha", "mean", "trace_vision", "trace_text", "trace_root": number,
    "error", "root_lower", "root_upper": number or null, "kept": {"vision": int, "text": int}, "removed", "missed":
    likewise, "left_out": [number] or null}]}.
    A number that is not finite is the string "inf" or "-inf". "mir", "error", "lower", "upper" and "distance" follow
    from the rest and are written for readers. Readers refuse a version above theirs; a new version is one whose keys
    change. Version 2 has no "settings"; version 1 has no "error", "missed" and "left_out" either, and its "notes" alone
    tell of missed tokens.
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
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.missed = {m: self.missed.get(m, [0] * len(self.terms)) for m in MODALITIES}

    @property
    def per_layer(self) -> list[float]:
        """The Fréchet distance of each layer."""
        return [terms.distance for terms in self.terms]

    @property
    def value(self) -> float:
        """MIR; -inf where every layer's distance is 0."""
        return _log10(math.fsum(self.per_layer))

    @property
    def error(self) -> float | None:
        """Standard error of `value` over the choice of samples (see `jackknife`); None without groups of samples, or
        where it is not finite.
        """
        return None if self.left_out is None else _finite_jackknife(self.left_out_values)

    @property
    def left_out_values(self) -> list[float]:
        """MIR with each group of samples left out; empty without groups."""
        return [_log10(math.fsum(layers)) for layers in zip(*(self.left_out or []), strict=True)]

    @property
    def layer_errors(self) -> list[float] | None:
        """The standard error of each layer's distance, as `error`."""
        return None if self.left_out is None else [jackknife(distances) for distances in self.left_out]

    @property
    def lower(self) -> float | None:
        """MIR is at least this (of the covariances as accumulated); None unless bounds were asked for."""
        bounds = [terms.lower for terms in self.terms]
        return None if None in bounds else _outward(_log10(math.fsum(bounds)), -math.inf)  # type: ignore[arg-type]

    @property
    def upper(self) -> float | None:
        """MIR is at most this (of the covariances as accumulated); None unless bounds were asked for."""
        bounds = [terms.upper for terms in self.terms]
        return None if None in bounds else _outward(_log10(math.fsum(bounds)), math.inf)  # type: ignore[arg-type]

    @property
    def total_missed(self) -> int:
        """`missed` over all layers and both modalities; 0 is exact."""
        return sum(map(sum, self.missed.values()))

    def __float__(self) -> float:
        return self.value

    def __format__(self, spec: str) -> str:
        return format(self.value, spec) if spec else str(self)

    def __str__(self) -> str:
        text = f"MIR {with_error(self.value, self.error)} over {len(self.terms)} layers"
        if self.lower is not None:
            text += f", between {self.lower:.6f} and {self.upper:.6f}"
        return "\n".join([text, *(f"note: {note}" for note in self.notes)])

    def to_json(self, path: str | Path | None = None) -> str:
        """The result as JSON (see the class), written to `path` if one is given: whole, or not at all."""
        layers = []
        errors = self.layer_errors
        for index, terms in enumerate(self.terms):
            layer: dict[str, Any] = {"layer": index + 1, "distance": terms.distance}
            layer |= {"error": errors[index] if errors else None, "alpha": self.alpha[index], **asdict(terms)}
            layer |= {name: {m: getattr(self, name)[m][index] for m in MODALITIES} for name in _COUNTS}
            layers.append(layer | {"left_out": self.left_out[index] if self.left_out else None})
        document = {
            "schema": SCHEMA,
            "version": VERSION,
            "mir": self.value,
            "error": self.error,
            "lower": self.lower,
            "upper": self.upper,
            "outliers": self.outliers,
            "normalize": self.normalize,
            "notes": self.notes,
            "settings": self.settings,
            "layers": layers,
        }
        text = json.dumps(_encode(document), indent=2, allow_nan=False) + "\n"
        if path is not None:
            _replace(Path(path), text)
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> MIRResult:
        """Read what `to_json` wrote: a path, or the JSON text itself. ValueError if it is something else."""
        text, name = str(source), "the text"
        try:
            if isinstance(source, Path) or not text.lstrip().startswith("{"):
                name = str(source)
                text = Path(source).read_text(encoding="utf-8")
            document = json.loads(text)
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{name} is not JSON: {error}") from error
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            raise ValueError(f'{name} is no MIR result: it takes JSON with "schema": "{SCHEMA}"')
        version = document.get("version")
        if type(version) is not int or not 1 <= version <= VERSION:
            raise ValueError(f"{name} has version {version} of the schema, this reader takes {VERSION}")
        try:
            return _result(document, version)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"{name} is an incomplete MIR result: {error!r}") from error

    def table(self) -> Table:
        """A rich table: one row per layer."""
        from modality_integration.report import layer_table

        return layer_table(self)

    def plot(self, path: str | Path) -> Path:
        """Draw the distance of each layer (as the right of the paper's Figure 2) into an image file."""
        from modality_integration.report import plot_layers

        return plot_layers(self, path)


def jackknife(left_out: Sequence[float]) -> float:
    """The standard error of a statistic from its G values with one of G groups of samples left out each.

    sqrt((G - 1) / G sum_g (x_g - mean)^2), the delete-a-group jackknife (Kott, The delete-a-group jackknife, Journal of
    Official Statistics, 2001), for groups of about the same size.
    """
    count = len(left_out)
    mean = math.fsum(left_out) / count
    return math.sqrt((count - 1) / count * math.fsum((value - mean) ** 2 for value in left_out))


def paired_error(a: MIRResult, b: MIRResult) -> float | None:
    """Standard error of b's MIR minus a's where both have the same samples in the same groups: the jackknife of the
    differences, in which what the choice of samples does to both cancels. None where it is not finite.
    """
    return _finite_jackknife([y - x for x, y in zip(a.left_out_values, b.left_out_values, strict=True)])


def with_error(value: float, error: float | None) -> str:
    """A value of MIR for people: `3.3740`, or `3.3740 +- 0.0021` with its standard error."""
    if error is None:
        return f"{value:.4f}"
    return f"{value:.4f} +- " + (f"{error:.4f}" if error >= 0.0005 or error == 0.0 else f"{error:.1e}")


def _finite_jackknife(values: Sequence[float]) -> float | None:
    return jackknife(values) if values and all(map(math.isfinite, values)) else None


def _log10(total: float) -> float:
    return math.log10(total) if total > 0.0 else -math.inf


def _outward(value: float, towards: float) -> float:
    # Two steps: the sum is rounded once and log10 is right to a unit in the last place.
    return math.nextafter(math.nextafter(value, towards), towards)


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _encode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _encode(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_encode(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _result(document: dict[str, Any], version: int) -> MIRResult:
    """A document as an object, or whatever error its first wrong entry leads to."""
    layers = document["layers"]
    if not isinstance(layers, list) or not layers:
        raise TypeError(f"layers: takes a list of one layer or more, got {layers!r}")
    if not isinstance(document["outliers"], str) or not isinstance(document["normalize"], bool):
        raise TypeError("outliers, normalize: take a word and true or false")
    if not isinstance(document["notes"], list) or not all(isinstance(note, str) for note in document["notes"]):
        raise TypeError("notes: takes a list of sentences")
    settings = document["settings"] if version > 2 else {}
    if not isinstance(settings, dict) or not all(map(_plain, settings.values())):
        raise TypeError(f"settings: takes an object of words, numbers, true, false and null, got {settings!r}")
    left_out: list[Any] = [layer["left_out"] for layer in layers] if version > 1 else [None]
    if left_out.count(None) not in (0, len(left_out)) or len({len(values or ()) for values in left_out}) > 1:
        raise ValueError("left_out: takes as many numbers in every layer")
    if any(values is not None and len(values) == 0 for values in left_out):
        raise ValueError("left_out: takes one number or more, or null")
    result = MIRResult(
        terms=[_terms(layer) for layer in layers],
        alpha=[_number(layer["alpha"]) for layer in layers],
        **{n: {m: [_count(layer[n][m]) for layer in layers] for m in MODALITIES} for n in _COUNTS[: 2 + (version > 1)]},
        left_out=None if None in left_out else [[_number(x, finite=False) for x in values] for values in left_out],
        outliers=document["outliers"],
        normalize=document["normalize"],
        notes=document["notes"],
        settings=settings,
    )
    derived = (*result.per_layer, result.value, result.lower, result.upper, result.error)
    if any(value is not None and math.isnan(value) for value in derived):
        raise ValueError("layers: their terms do not add up to a number")
    return result


def _terms(layer: dict[str, Any]) -> LayerTerms:
    bounds = ("root_lower", "root_upper")
    numbers: dict[str, Any] = {
        name: None if name in bounds and layer[name] is None else _number(layer[name], finite=name not in bounds)
        for name in LayerTerms.__dataclass_fields__
    }
    return LayerTerms(**numbers)


def _number(value: Any, *, finite: bool = True) -> float:
    if value in ("inf", "-inf") or (isinstance(value, int | float) and not isinstance(value, bool)):
        number = float(value)
        if math.isfinite(number) or (not finite and not math.isnan(number)):
            return number
    raise TypeError(f"takes a {'finite ' if finite else ''}number, got {value!r}")


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _count(value: Any) -> int:
    if type(value) is int and value >= 0:
        return value
    raise TypeError(f"takes a number of tokens, got {value!r}")
