"""Labels for several results: derived from their folders, or as given."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from modality_integration.app.errors import InputError


def labels_of(paths: Sequence[Path], given: Sequence[str] = ()) -> list[str]:
    """A distinct label per result: those `given`, if any, else the shortest that tell the folders apart.

    paths: `mir.json` files or their folders. `runs/a/mir.json` and `runs/b` become a and b, as do `a/out` and `b/out`;
    if the folder names are equal, as much of the path is added as differs. A file with another name, or one of several
    in a folder, adds its stem: `a/before.json` and `a/mir.json` become before and mir. A result given twice gets a
    number appended. InputError if the number of `given` labels is wrong, or one is empty or duplicate.
    """
    if given:
        return _checked(given, len(paths))
    results = [_result_of(path) for path in paths]
    beside = Counter(file.parent for file in set(results))
    parts = [
        (*folder.parts, file.stem) if file.stem != "mir" or beside[folder] > 1 else folder.parts
        for file in results
        for folder in [file.parent]
    ]
    different = list(dict.fromkeys(_without_common_end(parts)))
    names = {one: _shortest(one, different) for one in different}
    return _numbered([names[one] for one in _without_common_end(parts)])


def _checked(given: Sequence[str], count: int) -> list[str]:
    if len(given) != count:
        raise InputError(f"label: expected one label per result ({count}), got {len(given)}")
    for label, times in Counter(given).items():
        if not label.strip():
            raise InputError(f"label: expected a non-empty label, got {label!r}")
        if times > 1:
            raise InputError(f"label: expected a different label for each result, got {label!r} {times} times")
    return list(given)


def _result_of(path: Path) -> Path:
    """The file, absolute and without `..`; links are not resolved."""
    path = Path(os.path.abspath(path))
    is_file = path.is_file() or (path.suffix == ".json" and not path.is_dir())
    return path if is_file else path / "mir.json"


def _without_common_end(parts: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Paths without their common trailing names, unless all paths are equal."""
    if len(set(parts)) < 2:
        return parts
    while len({one[-1] for one in parts}) == 1 and all(len(one) > 2 for one in parts):
        parts = [one[:-1] for one in parts]
    return parts


def _shortest(one: tuple[str, ...], among: list[tuple[str, ...]]) -> str:
    """The shortest trailing part of a path that no other path ends with."""
    others = [other for other in among if other != one]
    for count in range(1, len(one)):
        if all(other[-count:] != one[-count:] for other in others):
            return "/".join(one[-count:])
    return str(Path(*one))


def _numbered(names: list[str]) -> list[str]:
    """Append (1), (2), ... to repeated names, skipping numbered names that already exist."""
    times, taken, found = Counter(names), set(names), []
    for name in names:
        number, label = 0, name
        while times[name] > 1 and label in taken:
            number += 1
            label = f"{name} ({number})"
        taken.add(label)
        found.append(label)
    return found
