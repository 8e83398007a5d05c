"""Pairs of images and prose, made as they are asked for, and groups of them that share no image and no text."""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import random
from collections.abc import Hashable, Iterator, Sequence
from typing import Protocol, overload

from modality_integration.app.samples.choosing import seed_of
from modality_integration.app.samples.sample import ImageSource, Sample, Text, content_digest
from modality_integration.metric.dealing import ends_of_groups, group_of, sharing

# Samples in file order, some of them repeated, among which groups that share nothing are looked for.
MOST_ORDERED = 1_000_000


class Order(Protocol):
    """Which image and which text make a sample."""

    def at(self, number: int) -> tuple[int, int]:
        """Their places among the images and among the texts."""

    @property
    def recipe(self) -> str:
        """What tells one order from another."""


class Samples(Sequence[Sample]):
    """Samples that are made as they are asked for, any number of them; slices are views.

    groups: of all samples, in the order they have here, for the standard error: as many as were wanted, or 0 where so
    many would share images or texts. in_turn: they are dealt in turn, not in blocks. repeats: whether an image or a
    text comes twice; the order is then made for these groups alone.
    """

    def __init__(
        self,
        images: Sequence[ImageSource],
        texts: Sequence[Text],
        order: Order,
        count: int,
        *,
        groups: int,
        in_turn: bool,
        repeats: bool,
        digests: tuple[Sequence[bytes], Sequence[bytes]] | None = None,
    ) -> None:
        self.images, self.texts, self.order = images, texts, order
        self.groups, self.in_turn, self.repeats = groups, in_turn, repeats
        self._digests = digests
        self._numbers = range(count)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, at: int) -> Sample: ...
    @overload
    def __getitem__(self, at: slice) -> Samples: ...
    def __getitem__(self, at: int | slice) -> Sample | Samples:
        if isinstance(at, slice):
            view = copy.copy(self)
            view._numbers = self._numbers[at]
            return view
        image, text = self.order.at(self._numbers[at])
        return Sample(self.images[image], self.texts[text])

    def digest(self) -> str:
        """A short hash of the content of every pair, in order; where they repeat, of what they are made of, and how."""
        images, texts = self._digests or (list(map(content_digest, self.images)), list(map(content_digest, self.texts)))
        hashed = hashlib.sha256()
        if self.repeats:
            hashed.update(f"{self.order.recipe}, {self._numbers}".encode())
            for digest in itertools.chain(images, texts):
                hashed.update(digest)
            return hashed.hexdigest()[:16]
        for number in self._numbers:
            image, text = self.order.at(number)
            hashed.update(images[image] + texts[text])
        return hashed.hexdigest()[:16]


def groups_of(samples: Sequence[Sample], wanted: int, in_turn: bool = False) -> int:
    """How many of `wanted` groups a standard error of these samples may have: all, or 0 where they would share any.

    in_turn: samples are dealt into groups in turn, not in blocks.
    """
    if not isinstance(samples, Samples) or not samples.repeats:
        return wanted
    return wanted if (samples.groups, samples.in_turn) == (wanted, in_turn) else 0


def samples_digest(samples: Sequence[Sample]) -> str:
    """A short hash of the content of every pair, in order; no file is read twice."""
    if isinstance(samples, Samples):
        return samples.digest()
    return pair([s.image for s in samples], [s.text for s in samples], len(samples), None).digest()


def pair(
    images: Sequence[ImageSource],
    texts: Sequence[Text],
    count: int,
    seed: int | None,
    groups: int = 0,
    *,
    in_turn: bool = False,
    keys: tuple[Sequence[Hashable], Sequence[Hashable]] | None = None,
    digests: tuple[Sequence[bytes], Sequence[bytes]] | None = None,
) -> Samples:
    """`count` pairs of a random image with unrelated prose; what is too few comes again, in a new order each round.

    seed None: in order, round after round.
    groups: of samples, for a standard error; see `modality_integration.metric.dealing`, which takes them as blocks, or
    in_turn. Where anything comes again, images and texts are each dealt into as many parts, and pairs made within a
    part: no two groups share any. With fewer images or texts than groups, the result's `groups` are 0.
    keys: what tells one image and one text from another; else each is its own. digests: of their content, if known.
    """
    keys = keys or (range(len(images)), range(len(texts)))
    repeats = any(count > len(of_kind) or len(set(of_kind[:count])) < count for of_kind in keys)
    make = functools.partial(Samples, images, texts, count=count, in_turn=in_turn, repeats=repeats, digests=digests)
    if seed is None:
        order = InOrder(len(images), len(texts))
        holds = not repeats or (groups and _share_nothing(_keys_of(order, keys, count), count, groups, in_turn))
        return make(order, groups=groups if holds else 0)
    if not repeats:
        return make(InParts(count, [list(range(count))], [list(range(count))], seed), groups=groups)
    used = keys[0][:count], keys[1][:count]
    parts = groups if min(len(set(of_kind)) for of_kind in used) >= groups else 0
    of_images, of_texts = (_dealt(of_kind, parts or 1) for of_kind in used)
    return make(InParts(count, of_images, of_texts, seed, in_turn), groups=parts)


def in_blocks(
    samples: Samples, groups: int, keys: tuple[Sequence[Hashable], Sequence[Hashable]] | None = None
) -> Samples:
    """Samples in file order, for groups that are blocks: in random order, and where any repeat, so that groups share
    no image and no text. Where `groups` such groups cannot be had, in file order with groups 0.
    """
    count, view = len(samples), copy.copy(samples)
    view.in_turn = False
    if not samples.repeats:
        view.order, view.groups = Shuffled(samples.order, _random_order(count)), groups
        return view
    keys = keys or (range(len(samples.images)), range(len(samples.texts)))
    order = None
    if groups and count <= MOST_ORDERED:
        order = _packed(list(_keys_of(samples.order, keys, count)), groups)
    view.groups = 0 if order is None else groups
    view.order = samples.order if order is None else Shuffled(samples.order, order)
    return view


class InOrder:
    """The first image with the first text, round after round."""

    def __init__(self, images: int, texts: int) -> None:
        self._images, self._texts = images, texts

    def at(self, number: int) -> tuple[int, int]:
        return number % self._images, number % self._texts

    @property
    def recipe(self) -> str:
        return "in order"


class Shuffled:
    """An order in another order."""

    def __init__(self, order: Order, numbers: Sequence[int]) -> None:
        self._order, self._numbers = order, numbers

    def at(self, number: int) -> tuple[int, int]:
        return self._order.at(self._numbers[number])

    @property
    def recipe(self) -> str:
        return f"{self._order.recipe}, {hashlib.sha256(repr(self._numbers).encode()).hexdigest()}"


class InParts:
    """Images and texts in parts, one a group of samples; within it, round after round of random pairs.

    Sample n of all is one of the group that `metric.dealing.dealt` deals it into.
    """

    def __init__(
        self,
        count: int,
        images: Sequence[Sequence[int]],
        texts: Sequence[Sequence[int]],
        seed: int,
        in_turn: bool = False,
    ) -> None:
        self._count, self._parts, self._in_turn = count, len(images), in_turn
        self._seed = seed
        self._images = [_Rounds(part, f"{seed_of(seed, 'image rounds')}/{g}") for g, part in enumerate(images)]
        self._texts = [_Rounds(part, f"{seed_of(seed, 'text rounds')}/{g}") for g, part in enumerate(texts)]

    def at(self, number: int) -> tuple[int, int]:
        if self._in_turn:
            part, place = number % self._parts, number // self._parts
        else:
            part = group_of(number, self._parts, self._count)
            place = number + (-part * self._count) // self._parts  # the part begins at part * count / parts, rounded up
        return self._images[part].at(place), self._texts[part].at(place)

    @property
    def recipe(self) -> str:
        return f"{self._count} in {self._parts} parts, in turn: {self._in_turn}, seed {self._seed}"


class _Rounds:
    """A part's items, again and again: first as they are, then in a random order each round."""

    def __init__(self, items: Sequence[int], seed: str) -> None:
        self._items, self._seed = items, seed
        self._round, self._order = 0, items

    def at(self, place: int) -> int:
        number, index = divmod(place, len(self._items))
        if number != self._round:
            mixed = random.Random(f"{self._seed}/{number}").sample(self._items, len(self._items))
            self._round, self._order = number, mixed if number else self._items
        return self._order[index]


def _dealt(keys: Sequence[Hashable], parts: int) -> list[list[int]]:
    """The places of each part's items: different keys are dealt in turn, the same one into one part."""
    part_of = {key: index % parts for index, key in enumerate(dict.fromkeys(keys))}
    dealt: list[list[int]] = [[] for _ in range(parts)]
    for index, key in enumerate(keys):
        dealt[part_of[key]].append(index)
    return dealt


def _keys_of(
    order: Order, keys: tuple[Sequence[Hashable], Sequence[Hashable]], count: int
) -> Iterator[tuple[Hashable, Hashable]]:
    """The keys of every sample's image and text."""
    for number in range(count):
        image, text = order.at(number)
        yield ("image", keys[0][image]), ("text", keys[1][text])


def _share_nothing(pairs: Iterator[tuple[Hashable, Hashable]], count: int, groups: int, in_turn: bool) -> bool:
    """Whether no key is in two groups of samples."""
    first: dict[Hashable, int] = {}
    for number, both in enumerate(itertools.islice(pairs, MOST_ORDERED + 1)):
        group = number % groups if in_turn else group_of(number, groups, count)
        if number == MOST_ORDERED or any(first.setdefault(key, group) != group for key in both):
            return False
    return True


def _packed(pairs: Sequence[tuple[Hashable, Hashable]], groups: int) -> list[int] | None:
    """An order of the samples in which groups, as blocks, share no key; None where none was found.

    Samples that share a key, directly or through others, stay together; the largest such sets go first, each into the
    block with the most room, and single samples fill what is left.
    """
    order = _random_order(len(pairs))
    together = [[order[place] for place in places] for places in sharing(pairs[number] for number in order)]
    room = [end - start for start, end in itertools.pairwise([0, *ends_of_groups(groups, len(pairs))])]
    blocks: list[list[int]] = [[] for _ in range(groups)]
    for numbers in sorted(together, key=len, reverse=True):
        block = max(range(groups), key=room.__getitem__)
        if len(numbers) > room[block]:
            return None
        room[block] -= len(numbers)
        blocks[block] += numbers
    return [number for block in blocks for number in block]


def _random_order(count: int) -> list[int]:
    return random.Random("order of the pass").sample(range(count), count)
