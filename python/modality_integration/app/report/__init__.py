"""`mir report`: runs side by side in one self-contained HTML file."""

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
    """Write the report of the runs in `paths`, each a folder or its mir.json, to the file `out`, and print its path.

    The report shows whatever a run's folder holds: mir.json, run.json (settings, versions, samples), a demo's
    history.json and the tables of studies. labels: one name per run; if empty, the names of their folders. Raises
    InputError for anything the user can fix.
    """
    if not paths:
        raise InputError("report: expected the folder of at least one run")
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
    """Write named results held in memory to one self-contained HTML file, replacing any file at `path`.

    It shows what a `MIRResult` holds; `mir report` on the folders of runs adds their samples and versions. Raises
    ValueError if `path` does not name an .html file or if `results` is empty.
    """
    if not results:
        raise ValueError("results: expected at least one, got none")
    path = Path(path)
    _require_page(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, html([Run(str(label), result) for label, result in results.items()]))
    return path


def _require_page(path: Path) -> None:
    """Raise ValueError unless `path` names an .html file, so that a report never replaces a result file."""
    if path.is_dir():
        raise ValueError(f"expected an .html file such as {path / 'report.html'}, got the folder {path}")
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"expected the name of an .html file, got {path}")
