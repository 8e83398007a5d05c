"""The whole report page: from runs to one self-contained HTML document."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from modality_integration.app.report import along, sections
from modality_integration.app.report.charts import mark
from modality_integration.app.report.runs import Run
from modality_integration.app.report.sections import Interval, Picture, Row, Table
from modality_integration.metric import comparison
from modality_integration.metric.result import MIRResult
from modality_integration.metric.standard_error import arithmetic, error_cell, missing_error

FILES_SHOWN = 50  # skipped files listed per run; run.json has them all
LABEL = 60  # longest label in characters
# Not allowed in HTML: control characters except tab and line feed, lone surrogates (from names that are not UTF-8) and
# noncharacters. Bidirectional controls are replaced too: one in a file's name could reverse a whole sentence.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


@dataclass
class Value:
    """The card of a run: MIR, its error or why there is none, and a few facts."""

    label: str
    color: int
    mir: str
    error: str
    arithmetic: str | None
    without_sinks: str | None
    facts: list[tuple[str, str]]


@dataclass
class OfRun:
    """A list that belongs to one run, or to several runs with identical lists."""

    label: str
    entries: list[Any]
    more: int = 0


@dataclass
class Verdict:
    """A comparison of several results."""

    sentences: list[str]
    notes: list[str]
    table: Table


@dataclass
class Page:
    """Everything the template shows, in its order; empty parts are omitted."""

    title: str
    labels: list[str]
    version: str
    values: list[Value] = field(default_factory=list)
    intervals: list[Interval] = field(default_factory=list)
    verdict: Verdict | None = None
    picture: Picture | None = None
    distances: list[Table] = field(default_factory=list)
    terms: list[Table] = field(default_factory=list)
    sinks: Table | None = None
    outliers: Table | None = None
    tokens: list[Table] = field(default_factory=list)
    training: list[tuple[str, list[Picture], Table]] = field(default_factory=list)
    studies: list[along.StudyPart] = field(default_factory=list)
    facts: list[Table] = field(default_factory=list)
    notes: list[tuple[str, list[str]]] = field(default_factory=list)
    skipped: list[OfRun] = field(default_factory=list)
    samples: list[OfRun] = field(default_factory=list)


def html(runs: Sequence[Run]) -> str:
    """One HTML document that shows the runs side by side without any other file, network access or script."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["mark"] = mark
    text = environment.get_template("report.html.jinja").render(page=page_of(runs))
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def page_of(runs: Sequence[Run]) -> Page:
    """Collect the contents of the page."""
    shortened = _shortened([run.label for run in runs])
    runs = [replace(run, label=label) for run, label in zip(runs, shortened, strict=True)]
    labels = [run.label for run in runs]
    page = Page(_title(labels), labels, version("mir-kernels"))
    measured = {run.label: (color, run.result) for color, run in enumerate(runs) if run.result is not None}
    results = {label: result for label, (_, result) in measured.items()}
    if results:
        settings = {run.label: run.settings for run in runs}
        page.values = [_value(label, *measured[label], settings[label]) for label in measured]
        page.picture = sections.layer_picture(measured)
        page.terms = [sections.terms_table(result, label) for label, result in results.items()]
        page.sinks = sections.sinks_table(results)
        page.outliers = sections.outliers_table(results)
        page.tokens = [sections.tokens_table(result, label) for label, result in results.items()]
    if len(results) > 1:
        page.intervals = sections.intervals((n, color, r.value, r.error) for n, (color, r) in measured.items())
        page.verdict = _verdict(results)
        page.distances = sections.distances_tables(results)
    for run in runs:
        if run.history is not None:
            pictures, table = along.training_pictures(run.history), along.training_table(run.history, run.label)
            page.training.append((run.label, pictures, table))
        page.studies += [along.study_part(study, run.label) for study in run.studies]
    facts = (
        ("Settings that determine the value", {run.label: run.settings for run in runs if run.result is not None}),
        ("Run environment", {run.label: run.circumstances for run in runs}),
        ("Versions", {run.label: run.versions for run in runs}),
    )
    page.facts = [table for caption, of in facts for table in sections.facts_tables(caption, of)]
    page.notes = _notes(results)
    page.samples = _alike((run.label, run.cards) for run in runs)
    page.skipped = _alike(((run.label, run.skipped) for run in runs), most=FILES_SHOWN)
    return page


def _shortened(labels: Sequence[str]) -> list[str]:
    """The labels, long ones with their middle elided, unless that would make two of them identical."""
    short = [one if len(one) <= LABEL else f"{one[: LABEL // 2]}…{one[-LABEL // 2 + 1 :]}" for one in labels]
    return short if len(set(short)) == len(set(labels)) else list(labels)


def _title(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - 3} more" if len(labels) > 3 else ""
    return f"MIR of {', '.join(labels[:3])}{more}"


def _value(label: str, color: int, result: MIRResult, settings: Mapping[str, Any]) -> Value:
    facts = [("layers", str(len(result.terms)))]
    named = {"model": "model", "samples": "samples", "dtype": "weights"}
    facts += [(words, str(settings[name])) for name, words in named.items() if name in settings]
    without, known = result.value_without_sinks, "standard error over the choice of samples"
    return Value(
        label,
        color,
        sections.shown(result.value, result.error),
        missing_error(result) or f"{known}, from {len(result.left_out_values)} groups",
        arithmetic(result),
        None if without is None else f"{without:.4f}",
        facts,
    )


def _verdict(results: dict[str, MIRResult]) -> Verdict:
    """Compare every other result with the first."""
    several = comparison.compare_several(results)
    rows = []
    for label, one in several.against.items():
        z = "" if one.z is None else f"{one.z:+.1f}"
        cells = [f"{one.difference:+.4f}", error_cell(one.error), z, "yes" if one.paired else "no"]
        rows.append(Row(label, cells))
    columns = ["run", "difference", "standard error", "in standard errors", "paired"]
    first = next(iter(results))
    return Verdict(several.lines(), several.notes, Table(f"Difference from the MIR of {first}", columns, rows))


def _notes(results: dict[str, MIRResult]) -> list[tuple[str, list[str]]]:
    """Each distinct note with the runs it applies to."""
    of_note: dict[str, list[str]] = {}
    for label, result in results.items():
        for note in dict.fromkeys(result.notes):
            of_note.setdefault(note, []).append(label)
    return [(note, labels if len(results) > 1 else []) for note, labels in of_note.items()]


def _alike(lists: Iterable[tuple[str, list[Any]]], most: int | None = None) -> list[OfRun]:
    """The first `most` entries of each run's list; identical lists are merged and empty ones omitted."""
    found: list[tuple[list[str], list[Any]]] = []
    for label, entries in lists:
        same = next((labels for labels, others in found if others == entries), None)
        if same is not None:
            same.append(label)
        elif entries:
            found.append(([label], entries))
    return [OfRun(", ".join(labels), entries[:most], len(entries) - len(entries[:most])) for labels, entries in found]
