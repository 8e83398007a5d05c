"""`mir report`: runs side by side as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from modality_integration.app.errors import InputError, require_unused
from modality_integration.app.labels import labels_of
from modality_integration.app.report.page import html
from modality_integration.app.report.runs import Run, read
from modality_integration.metric.files import write_text
from modality_integration.metric.result import MIRResult

__all__ = ["run", "write_report"]


def run(paths: Sequence[Path], out: Path, labels: Sequence[str], results: Console, overwrite: bool = False) -> Path:
    """Write the report of the runs in `paths`, each a folder or its mir.json, to the file `out`, and say so.

    A run's folder may hold mir.json, run.json (settings, versions, samples), a demo's history.json, and studies'
    tables; what is there is shown. labels: what the runs are called, one each; none takes the names of their folders.
    Raises InputError for what a person can mend.
    """
    if not paths:
        raise InputError("report: takes the folder of one run or more")
    if out.is_dir():
        raise InputError(f"out: {out} is a folder; expected the name of a file, such as {out / 'report.html'}")
    if out.suffix.lower() not in (".html", ".htm"):  # --overwrite would make a page of a result
        raise InputError(f"out: takes the name of an .html file, got {out}")
    require_unused([out], overwrite)
    named = labels_of(paths, labels)
    text = html([read(path, label) for path, label in zip(paths, named, strict=True)])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    results.print(f"wrote {out} ({len(text.encode()) / 1e3:.0f} kB)", highlight=False, markup=False, soft_wrap=True)
    return out


def write_report(results: Mapping[str, MIRResult], path: str | Path) -> Path:
    """Write results of this process, by name, as one self-contained HTML file, in place of what `path` holds.

    It shows what a `MIRResult` knows; `mir report` of the folders of runs adds their samples and versions.
    """
    if not results:
        raise ValueError("results: expected one or more, got none")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, html([Run(str(label), result) for label, result in results.items()]))
    return path
