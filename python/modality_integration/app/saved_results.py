"""Read results of earlier runs from the given files or folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from modality_integration.app.errors import InputError, refusals
from modality_integration.app.labels import labels_of
from modality_integration.metric.result import MIRResult


def named_results(paths: Sequence[Path], labels: Sequence[str] = ()) -> dict[str, MIRResult]:
    """The results in mir.json files or their folders, by their labels from `labels_of`."""
    results = [read_result(path) for path in paths]
    return dict(zip(labels_of(paths, labels), results, strict=True))


def read_result(path: Path) -> MIRResult:
    """The result in a file, or in the mir.json of a folder; InputError if there is none."""
    file = path / "mir.json" if path.is_dir() else path
    if not file.exists():
        raise InputError(f"{file} does not exist")
    with refusals(""):
        return MIRResult.from_json(file)
