"""Notes of a result on attention sinks: their number, their positions and their effect on the value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from modality_integration.metric import MODALITIES

FIXED = 0.9  # share of sinks at one position from which it is named


class WithSinks(Protocol):
    """The fields that the notes read: a `MIRResult`."""

    sinks: str
    massive: dict[str, list[int]]
    sink_positions: dict[str, dict[int, int]]
    without_sinks: list[float] | None

    @property
    def per_layer(self) -> list[float]:
        """The distance of each layer."""

    @property
    def value(self) -> float:
        """MIR."""

    @property
    def value_without_sinks(self) -> float | None:
        """MIR without sinks."""


def notes_on_sinks(result: WithSinks) -> list[str]:
    """One note per modality that has (or had) attention sinks, and one on their effect on the value.

    Empty if there are no tokens of massive activation.
    """
    found = [m for m in MODALITIES if any(result.massive[m])]
    if not found:
        return []
    notes = [f"attention sinks: {_tokens(m, result.massive[m], result.sink_positions[m])}" for m in found]
    if result.sinks == "leave out":
        return [f"{note}; they are left out of every layer" for note in notes]
    without = result.value_without_sinks
    if without is not None and result.without_sinks is not None:
        pairs = list(zip(result.per_layer, result.without_sinks, strict=True))
        layer = max(range(len(pairs)), key=lambda k: pairs[k][0] - pairs[k][1])
        with_them, without_them = pairs[layer]
        notes.append(
            f"MIR is {result.value:.4f} with the attention sinks and {without:.4f} without them; their effect is "
            f"largest in layer {layer + 1}, whose distance is {with_them:.4g} with and {without_them:.4g} without. "
            'A sink carries no information about its image or text; sinks="leave out" excludes them'
        )
    return notes


def image_first(rows: int, of: int) -> str:
    """Warning for vision tokens at the very beginning of `rows` of `of` sequences."""
    where = "every sequence" if rows == of else f"{rows} of {of} sequences"
    return (
        f"the image is the first thing in {where}: most decoders make the first token an attention sink, and MIR then "
        "measures that sink; put a BOS token or the chat template before the image, or leave sinks out "
        '(sinks="leave out")'
    )


def _tokens(modality: str, counts: Sequence[int], positions: Mapping[int, int]) -> str:
    """`48 vision tokens of massive activation, at position 0, in layers 12-28`."""
    layers = [k for k, count in enumerate(counts, 1) if count]
    most = max(counts)
    word = "token" if most == 1 else "tokens"
    return f"{most} {modality} {word} of massive activation{_places(positions)}, in {_ranges(layers)}"


def _places(positions: Mapping[int, int]) -> str:
    total = sum(positions.values())
    if not total:
        return ""
    place, count = max(positions.items(), key=lambda item: item[1])
    if count == total:
        return f", all at position {place}"
    if count >= FIXED * total:
        return f", nearly all at position {place}"
    at_first = positions.get(0, 0)
    first = f", {at_first} of them at position 0" if at_first else ""
    return f", scattered over {len(positions)} positions{first}"


def _ranges(layers: Sequence[int]) -> str:
    """`layer 3`, or `layers 3, 12-28`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"layer{'s' * (len(layers) > 1)} {text}"
