"""`mir compute --study NAME`: the paper's studies of one model, each a table and a plot.

samples        MIR against the number of samples (Table 6, Figure 8)
normalization  every layer with and without the text-centric normalisation (Figure 7)
content        kinds of images with kinds of text (Figure 3 a)
template       with and without the conversation template (Figure 3 b)
layers         every layer's distance and its terms (Figure 2, right)

Where possible a study makes one pass over the data: `samples` reads MIR along one stream, and `normalization` computes
both its values from one set of covariances. Values have standard errors. A study computes no bounds and writes no
checkpoint, but its table holds every finished row. `missed` counts tokens that the one-pass outlier rule should have
removed (see `ModalityIntegrationRate`); 0 means exact.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console

from modality_integration.app import plots, tables
from modality_integration.app.console import progress_bar, show_notes
from modality_integration.app.devices import pick_device
from modality_integration.app.errors import InputError, Interrupted, in_words
from modality_integration.app.loading import load_chosen
from modality_integration.app.options import (
    ComputeOptions,
    MeasureOptions,
    PlotFormat,
    StudyName,
    Template,
    TokenOptions,
    part,
)
from modality_integration.app.out_folder import require_free, taken
from modality_integration.app.processes import require_one_process
from modality_integration.app.results import NotWritten, draw, printed_first, say_written
from modality_integration.app.samples import Sample, choose, groups_of
from modality_integration.app.stream import finish, stream
from modality_integration.metric import MODALITIES
from modality_integration.metric.files import write_text
from modality_integration.metric.result import MIRResult
from modality_integration.metric.standard_error import counted
from modality_integration.metric.streaming import ModalityIntegrationRate

TEMPLATES: tuple[Literal["chat", "plain"], ...] = ("chat", "plain")
COUNTS = (5, 10, 20, 50, 100, 200, 500, 800, 1000)  # numbers of samples, as in Table 6; 1 has no standard error

Row = dict[str, Any]
Advance = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Subject(MeasureOptions, TokenOptions):
    """The subject of a study: a model with its processor, and how tokens are chosen and counted."""

    model: Any
    processor: Any
    bounds: bool = False
    batch_size: int = 1

    def with_groups_of(self, samples: Sequence[Sample], in_turn: bool = False) -> Subject:
        """A copy with as many groups, in blocks or round-robin, as `samples` allow without shared content."""
        return replace(self, groups=groups_of(samples, self.groups, in_turn))

    def fresh_metric(self, samples: int | None = None) -> ModalityIntegrationRate:
        """A new metric on the model's device. samples: how many will come; None to read results before the last."""
        return self.metric(samples).to(next(self.model.parameters()).device)

    def feed(self, metric: ModalityIntegrationRate, samples: Sequence[Sample], start: int, advance: Advance) -> None:
        """Count `samples[start:]`; calls advance(n) after each forward pass of n samples."""
        done = start

        def after_sample(count: int) -> None:
            nonlocal done
            advance(count - done)
            done = count

        stream(
            self.model,
            self.processor,
            samples,
            metric,
            self,
            start=start,
            batch_size=self.batch_size,
            after_sample=after_sample,
        )

    def measure(self, samples: Sequence[Sample], advance: Advance) -> MIRResult:
        """MIR over `samples`."""
        metric = self.with_groups_of(samples).fresh_metric(len(samples))
        self.feed(metric, samples, 0, advance)
        return finish(metric)


def run(
    name: StudyName, options: ComputeOptions, console: Console, repeat: int = 1, results: Console | None = None
) -> list[Row]:
    """The rows of study `name`; also written to study_<name>.csv and plotted as study_<name>.png in `options.out`.

    repeat: number of sample sets for "samples", each with its own seed. console, results: as in `compute.run`.
    Raises InputError for anything a user can fix, including an `options.out` that holds this study or is in use;
    NotWritten if the rows were printed but could not be written; Interrupted after Ctrl-C.
    """
    if repeat > 1 and (name != "samples" or options.in_order):
        raise InputError("repeat: applies only to the random samples of --study samples")
    require_one_process("study")
    for given, option in ((options.second_pass, "--second-pass"), (options.restart, "--restart")):
        if given:
            raise InputError(
                f"study: writes no checkpoint and makes one pass over the data, so it does not accept {option}"
            )
    options.metric()  # checks the options before anything is read
    table, shown = options.out / f"study_{name}.csv", results or console
    with taken(options.out, console):
        require_free(options.out, (table.name, *(f"study_{name}.{s}" for s in get_args(PlotFormat))), options.overwrite)
        cells: dict[tuple[str, str], Sequence[Sample]] = {}
        for number in range(repeat):
            of_seed = replace(options, seed=options.seed + number)
            cells |= _cells(name, of_seed, console, f" {number + 1}" * (repeat > 1))
        prompts: tuple[Template, ...] = TEMPLATES if name == "template" else (options.prompt,)
        model, processor, notes = load_chosen(options, prompts, pick_device(options.device), console)
        show_notes(notes, console)
        asked = {**part(options, TokenOptions), **part(options, MeasureOptions), "bounds": False}
        subject = Subject(model=model, processor=processor, batch_size=options.batch_size, **asked)
        done: list[Row] = []
        try:
            with progress_bar(console) as bar:
                total = sum(map(len, cells.values())) * (len(TEMPLATES) if name == "template" else 1)
                task = bar.add_task(f"{Path(options.model).name}, study of {name}", total=total)
                rows = rows_of(name, subject, cells, lambda count: bar.advance(task, count))
                write(name, rows, options.out, done=done, console=console)
        except KeyboardInterrupt as interrupt:
            raise Interrupted(_kept(done, table, shown)) from interrupt
        with printed_first(lambda: shown.print(tables.rows_table(done))):
            try:
                write_rows(table, done)
            except OSError as error:
                raise NotWritten(f"the rows could not be written: {in_words(error)}", done) from error
            picture = options.out / f"study_{name}.{options.plots}"
            drawn = draw(lambda file: plots.plot_study(name, done, file), picture, console)
        say_written([table.name, *drawn], options.out, shown)
        return done


def rows_of(
    name: str, subject: Subject, cells: dict[tuple[str, str], Sequence[Sample]], advance: Advance = lambda count: None
) -> Iterator[Row]:
    """The rows of study `name`, one by one as they are measured.

    cells: the samples by kind of image and kind of text. "content" uses several, "samples" treats each as a separate
    set, the others require exactly one.
    """
    if name == "content":
        return content(subject, cells, advance)
    if name == "samples" and len(cells) > 1:
        return repeated_sample_count(subject, list(cells.values()), advance)
    (samples,) = cells.values()
    return {"samples": sample_count, "normalization": normalization, "template": template, "layers": layers}[name](
        subject, samples, advance
    )


def write(
    name: str,
    rows: Iterator[Row],
    out: Path,
    extra: Row | None = None,
    *,
    done: list[Row] | None = None,
    console: Console | None = None,
) -> list[Row]:
    """Add rows to `done` as they arrive, each time writing all to <out>/study_<name>.csv with the columns of `extra`.

    With a `console`, a failed write is a note there, and the next row tries again.
    """
    done = [] if done is None else done
    for row in rows:
        done.append(row)
        try:
            write_rows(out / f"study_{name}.csv", done, extra)
        except OSError as error:
            if console is None:
                raise
            show_notes([f"row {len(done)} could not be written: {in_words(error)}"], console)
    return done


def write_rows(path: Path, rows: Sequence[Row], extra: Row | None = None) -> None:
    """Write a CSV of the rows, each with the columns of `extra`, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, [*rows[0], *(extra or {})])
    writer.writeheader()
    writer.writerows({key: _written(value) for key, value in {**row, **(extra or {})}.items()} for row in rows)
    write_text(path, text.getvalue())


def read(path: Path) -> list[Row]:
    """Read rows written by `write_rows`, with numbers as numbers and empty cells as None."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: _read(cell) for key, cell in row.items()} for row in csv.DictReader(file)]


def sample_count(subject: Subject, samples: Sequence[Sample], advance: Advance) -> Iterator[Row]:
    """MIR after 5, 10, 20, 50, ... and all samples of one stream.

    The paper draws ten sets per count and reports mean and range: see `repeated_sample_count`. The standard error of
    one set is about as informative.
    """
    metric, done = subject.with_groups_of(samples, in_turn=True).fresh_metric(), 0
    for count in sorted({*(c for c in COUNTS if c < len(samples)), len(samples)}):
        subject.feed(metric, samples[:count], done, advance)
        result, done = finish(metric), count
        tokens = {f"{m}_tokens": result.kept[m][0] + result.removed[m][0] for m in MODALITIES}
        yield {"samples": count, **tokens, **_value(result)}


def repeated_sample_count(subject: Subject, sets: Sequence[Sequence[Sample]], advance: Advance) -> Iterator[Row]:
    """`sample_count` for each set of samples; Table 6 and Figure 8 show the mean and range over sets."""
    for number, samples in enumerate(sets, 1):
        for row in sample_count(subject, samples, advance):
            yield {"set": number, **row}


def normalization(subject: Subject, samples: Sequence[Sample], advance: Advance) -> Iterator[Row]:
    """Each layer's distance with the scale alpha of Eq. 2, and without.

    Scaling features by alpha scales means by alpha, covariances by alpha^2, and so the distance by alpha^2; the outlier
    rule is unaffected. One computation therefore yields both.
    """
    result = replace(subject, normalize=True, groups=0).measure(samples, advance)
    for layer, (distance, alpha) in enumerate(zip(result.per_layer, result.alpha, strict=True), 1):
        missed = sum(result.missed[m][layer - 1] for m in MODALITIES)
        row = {"layer": layer, "alpha": alpha, "normalized": distance, "unnormalized": distance / alpha**2}
        yield row | {"missed": missed}


def content(subject: Subject, cells: dict[tuple[str, str], Sequence[Sample]], advance: Advance) -> Iterator[Row]:
    """MIR of every kind of image with every kind of text; text tokens attend to the image, so each pair is a stream."""
    for (images, text), samples in cells.items():
        result = subject.measure(samples, advance)
        yield {"images": images, "text": text, "samples": len(samples), **_value(result)}


def template(subject: Subject, samples: Sequence[Sample], advance: Advance) -> Iterator[Row]:
    """MIR of the same samples in the chat template and in the plain one."""
    for name in TEMPLATES:
        one = replace(subject, protocol="random", text_tokens=subject.prose_tokens, template=name)
        result = one.measure(samples, advance)
        yield {"template": name, "samples": len(samples), **_value(result)}


def layers(subject: Subject, samples: Sequence[Sample], advance: Advance) -> Iterator[Row]:
    """Each layer's distance, its standard error, and the terms of Eq. 3."""
    result = subject.measure(samples, advance)
    for index, terms in enumerate(result.terms):
        parts = {name: value for name, value in asdict(terms).items() if not name.startswith("root_")}
        yield {
            "layer": index + 1,
            "distance": terms.distance,
            "error": result.layer_errors and result.layer_errors[index],
            **parts,
            "alpha": result.alpha[index],
            "missed": sum(result.missed[m][index] for m in MODALITIES),
        }


def _kept(done: Sequence[Row], table: Path, console: Console) -> str:
    """Print the finished rows of an interrupted study; returns a message on where they are."""
    if not done:
        return "interrupted before the first row"
    words = f"interrupted after {len(done)} row{'s' * (len(done) > 1)}"
    console.print(tables.rows_table(done))
    try:
        write_rows(table, done)
    except OSError as error:
        return f"{words}, which could not be written: {in_words(error)}"
    return f"{words}, saved in {table}"


def _cells(
    name: str, options: ComputeOptions, console: Console, mark: str = ""
) -> dict[tuple[str, str], Sequence[Sample]]:
    """The samples by kind of image and kind of text: per sub-folder for "content", otherwise all together."""
    images, texts = [options.images], [options.text]
    if name == "content":
        images, texts = _kinds(options.images, console), _kinds(options.text, console)
        if len(images) * len(texts) < 2:
            raise InputError(
                f"study: content compares kinds, each a sub-folder of --images or --text; neither {options.images} nor "
                f"{options.text} has two"
            )
    cells: dict[tuple[str, str], Sequence[Sample]] = {}
    for image, text in product(images, texts):
        in_turn = name == "samples"  # it reads results with standard errors before the last sample
        chosen = choose(replace(options, images=image, text=text), console, in_turn=in_turn)
        cells[image.name, text.name + mark] = chosen.samples
        show_notes((f"{image.name} with {text.name}: {note}" for note in chosen.notes), console)
    return cells


def _kinds(folder: Path, console: Console) -> list[Path]:
    if not folder.exists():
        raise InputError(f"{folder} does not exist")
    inside = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    kinds = sorted(path for path in inside if path.is_dir())
    if kinds and (beside := len(inside) - len(kinds)):
        show_notes(
            [f"ignored {counted(beside, 'file')} next to the sub-folders of {folder}: only sub-folders are kinds"],
            console,
        )
    return kinds or [folder]


def _value(result: MIRResult) -> Row:
    return {"mir": result.value, "error": result.error, "missed": result.total_missed}


def _written(value: Any) -> Any:
    return f"{value:.7g}" if isinstance(value, float) else value


def _read(cell: str) -> Any:
    if cell == "":
        return None
    try:
        number = float(cell)
    except ValueError:
        return cell
    return int(number) if math.isfinite(number) and number == int(number) and "." not in cell else number
