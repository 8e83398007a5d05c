"""What is not alike in results that are compared, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

VERSION = "_version"  # ends the names of settings that are versions
DIGESTS = ("chosen_samples",)  # that they differ is all they tell
# What does not change the value: where results go, and what they look like.
WITHOUT_EFFECT = ("plot_format", "out", "overwrite")


class Set(Protocol):
    """What the notes are read from: a `MIRResult`."""

    outliers: str
    normalize: bool
    sinks: str
    settings: dict[str, Any]
    terms: list[Any]


def notes_on_settings(results: Mapping[str, Set]) -> list[str]:
    """A sentence for each setting that differs, one for all versions, and one for depths.

    A setting counts where it is known of every result. Of two, values are given in order; of more, each with its names.
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
            notes.append(f"{words} differs: {_alike(labels, of)}")
        elif name == "image_processor":
            notes.append(
                f"image processor differs: {_by_label(labels, of)}; this alone changes MIR, mostly in its 4th digit"
            )
        else:
            notes.append(f"{words} differs: {_by_label(labels, of)}")
    if versions:
        notes.append(f"versions differ: {', '.join(versions)}")
    depths = [len(r.terms) for r in results.values()]
    if len(set(depths)) > 1:
        notes.append(f"{_by_label(labels, depths)} layers: MIR sums over them, and is compared as it stands")
    return notes


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, or `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _by_label(labels: Sequence[str], values: Sequence[Any]) -> str:
    """`x and y` of two; of more, `x (a, c) and y (b)`."""
    if len(values) == 2:
        return f"{values[0]} and {values[1]}"
    return listed([f"{values[of[0]]} ({', '.join(labels[k] for k in of)})" for of in _groups(values)])


def _alike(labels: Sequence[str], values: Sequence[Any]) -> str:
    """Which have the same value: `others in each`, or `the same in a and c, others in b`."""
    groups = _groups(values)
    if len(groups) == len(values):
        return "others in each"
    groups.sort(key=len, reverse=True)
    return "the same in " + ", others in ".join(listed([labels[n] for n in of]) for of in groups)


def _groups(values: Sequence[Any]) -> list[list[int]]:
    """The places of each value, in the order in which values come first."""
    groups: list[list[int]] = []
    for place, value in enumerate(values):
        for group in groups:
            if values[group[0]] == value:
                group.append(place)
                break
        else:
            groups.append([place])
    return groups
