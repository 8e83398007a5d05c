"""Notes on settings that differ between compared results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

VERSION = "_version"  # suffix of settings that are versions
DIGESTS = ("chosen_samples",)  # their values mean nothing to a reader
# Settings of the output, which do not affect the value.
WITHOUT_EFFECT = ("plot_format", "out", "overwrite")


class Set(Protocol):
    """The fields that the notes read: a `MIRResult`."""

    outliers: str
    normalize: bool
    sinks: str
    settings: dict[str, Any]
    terms: list[Any]


def notes_on_settings(results: Mapping[str, Set]) -> list[str]:
    """One note per setting that differs, one for all versions, and one for depths.

    Only settings that every result has are compared. For two results the values are listed in order; for more, each
    value is followed by the names of its results.
    """
    known = [
        {"outliers": r.outliers, "normalize": r.normalize, "sinks": r.sinks, **r.settings} for r in results.values()
    ]
    names = [name for name in known[0] if name not in WITHOUT_EFFECT and all(name in settings for settings in known)]
    values = {name: [settings[name] for settings in known] for name in names}
    values = {name: of for name, of in values.items() if any(value != of[0] for value in of)}
    labels = list(results)
    notes, versions = [], []
    for name, of in values.items():
        words = name.replace("_", " ")
        if name.endswith(VERSION):
            package = name.removesuffix(VERSION).replace("_", "-")
            versions.append(f"{package} {_by_label(labels, ['not installed' if v is None else v for v in of])}")
        elif name in DIGESTS:
            notes.append(f"{words} differ: {_alike(labels, of)}")
        elif name == "image_processor":
            notes.append(
                f"image processor differs: {_by_label(labels, of)}; this alone changes MIR, mostly in its 4th digit"
            )
        else:
            notes.append(f"{words} {'differ' if words.endswith('s') else 'differs'}: {_by_label(labels, of)}")
    if versions:
        notes.append(f"versions differ: {', '.join(versions)}")
    depths = [len(r.terms) for r in results.values()]
    if len(set(depths)) > 1:
        notes.append(
            f"{_by_label(labels, depths)} layers: MIR is a sum over layers and is compared without correction for depth"
        )
    return notes


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, or `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _by_label(labels: Sequence[str], values: Sequence[Any]) -> str:
    """`x and y` for two values; for more, `x (a, c) and y (b)`."""
    if len(values) == 2:
        return f"{values[0]} and {values[1]}"
    return listed([f"{values[of[0]]} ({', '.join(labels[k] for k in of)})" for of in _groups(values)])


def _alike(labels: Sequence[str], values: Sequence[Any]) -> str:
    """Which results share a value: `each run has its own`, or `the same in a and c, different in b`."""
    groups = _groups(values)
    if len(groups) == len(values):
        return "each run has its own"
    groups.sort(key=len, reverse=True)
    return "the same in " + ", different in ".join(listed([labels[n] for n in of]) for of in groups)


def _groups(values: Sequence[Any]) -> list[list[int]]:
    """The indices of each distinct value, in order of first occurrence."""
    groups: list[list[int]] = []
    for place, value in enumerate(values):
        for group in groups:
            if values[group[0]] == value:
                group.append(place)
                break
        else:
            groups.append([place])
    return groups
