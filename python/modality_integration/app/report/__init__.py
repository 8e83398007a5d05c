"""`mir report`: runs side by side as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from modality_integration.app.errors import InputError, refusals, require_unused
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
    with refusals("out"):
        _require_page(out)
    require_unused([out], overwrite)
    named = labels_of(paths, labels)
    text = html([read(path, label) for path, label in zip(paths, named, strict=True)])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    results.print(f"wrote {out} ({len(text.encode()) / 1e3:.0f} kB)", highlight=False, markup=False, soft_wrap=True)
    return out


def write_report(results: Mapping[str, MIRResult], path: str | Path) -> Path:
    """Write results of this process, by name, as one self-contained HTML file, in place of what `path` holds.

    It shows what a `MIRResult` knows; `mir report` of the folders of runs adds their samples and versions. ValueError
    for a name that is not of an .html file, and for no results.
    """
    if not results:
        raise ValueError("results: expected one or more, got none")
    path = Path(path)
    _require_page(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, html([Run(str(label), result) for label, result in results.items()]))
    return path


def _require_page(path: Path) -> None:
    """ValueError unless this may be a page: the results that it is made of are files, too, and may not become one."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; takes the name of a file, such as {path / 'report.html'}")
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"takes the name of an .html file, got {path}")
