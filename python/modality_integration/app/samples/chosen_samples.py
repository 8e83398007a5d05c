"""`choose`: the samples requested by the options, with notes about them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from modality_integration.app.errors import InputError
from modality_integration.app.options import ComputeOptions, MeasureOptions
from modality_integration.app.samples.choosing import Chosen
from modality_integration.app.samples.images import choose_images
from modality_integration.app.samples.pairing import Samples, in_blocks, pair
from modality_integration.app.samples.texts import choose_texts

logger = logging.getLogger(__name__)


MOST_SAMPLES = 10**12  # so that a sample number times the number of groups fits in 64 bits
# Up to this many samples in file order, a smaller number of groups is searched for.
MOST_TRIED = 10_000

if TYPE_CHECKING:
    from rich.console import Console


class ChosenSamples(NamedTuple):
    """Pairs, notes for the result, and broken files as (name, reason)."""

    samples: Samples
    notes: list[str]
    skipped: list[tuple[str, str]]

    @property
    def groups(self) -> int:
        """Number of groups of samples that share no image and no text: as many as requested, or 0."""
        return self.samples.groups


def choose(options: ComputeOptions, console: Console, *, in_turn: bool = False) -> ChosenSamples:
    """The pairs requested by `options`, in the order of the pass; broken files are printed and skipped.

    in_turn: deal samples into groups round-robin, so that the first few are in different groups; otherwise groups are
    contiguous blocks. If images or texts repeat, pairs are made within the groups that `options` request, or within the
    default number if they request none, so that asking for a standard error does not change the value.
    """
    if options.samples > MOST_SAMPLES:
        raise InputError(f"samples: expected at most {MOST_SAMPLES}, got {options.samples}")
    from modality_integration.app.console import show_notes  # imports rich, which a probe does not need

    seed = None if options.in_order else options.seed
    images = choose_images(options.images, options.samples, seed, distinct=not options.in_order)
    texts = choose_texts(options.text, options.samples, seed, distinct=not options.in_order)
    show_notes([*_skipped(images.skipped, "image"), *_skipped(texts.skipped, "text")], console)
    digests = images.digests, texts.digests
    keys = digests if options.in_order else None  # by seed, nothing is chosen twice

    def samples_in(groups: int) -> Samples:
        samples = pair(
            images.items, texts.items, options.samples, seed, groups, in_turn=in_turn, keys=keys, digests=digests
        )
        return in_blocks(samples, groups, keys) if options.in_order and not in_turn else samples

    samples = samples_in(options.groups or MeasureOptions.groups)
    if not options.groups:
        samples.groups = 0
    notes = _notes(images, texts, options.samples)
    if options.in_order and options.images == options.text:
        notes.append(
            f"images and prose come from the same rows of {options.images} in order, so each image is paired with its "
            "own text; the paper pairs unrelated ones, as --protocol random does"
        )
    if options.groups and not samples.groups:
        fewest = min(len(set(of_kind)) for of_kind in digests)
        fewer = min(fewest, options.groups - 1)
        if options.in_order and fewer > 1:
            looked_at = range(fewer, 1, -1) if options.samples <= MOST_TRIED else ()
            fewer = next((groups for groups in looked_at if samples_in(groups).groups), 0)
        notes.append(_no_error(images, texts, options, fewer))
    return ChosenSamples(samples, notes, images.skipped + texts.skipped)


def _no_error(images: Chosen, texts: Chosen, options: ComputeOptions, fewer: int) -> str:
    """Why there is no standard error, and how to get one. fewer: a number of groups that would work; 0 or 1 if none."""
    found = []
    for chosen, what in ((images, "image"), (texts, "text")):
        unique = len(set(chosen.digests))
        found.append(f"{unique} unique {what}{'s' * (unique != 1)}")
    where = " in file order" if options.in_order else ""
    return (
        f"no standard error: {' and '.join(found)}{where} cannot make {options.samples} samples in {options.groups} "
        f"groups that share nothing; use more files{f' or --groups {fewer}' if fewer > 1 else ''}"
    )


def _notes(images: Chosen, texts: Chosen, samples: int) -> list[str]:
    notes = []
    for chosen, what in ((images, "image"), (texts, "text")):
        if chosen.unread:
            notes.append(chosen.unread)
        if chosen.skipped:
            notes.append(f"skipped {len(chosen.skipped)} broken {what}{'s' * (len(chosen.skipped) > 1)}")
        if chosen.copies:
            notes.append(f"skipped {chosen.copies} duplicate {what}{'s' * (chosen.copies > 1)}")
        if len(chosen.items) < samples:
            notes.append(
                f"{len(chosen.items)} usable {what}{'s' * (len(chosen.items) != 1)} for {samples} samples: some are "
                "used more than once"
            )
    return notes


def _skipped(skipped: Sequence[tuple[str, str]], what: str, most: int = 5) -> list[str]:
    lines = [f"broken {what} {name}: {reason}" for name, reason in skipped[:most]]
    return lines + ([f"and {len(skipped) - most} more broken {what}s"] if len(skipped) > most else [])
