"""Pairs of images and prose, made on demand, and groups of pairs that share no image and no text."""

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

# Up to this many samples in file order, with repeats, are searched for groups that share nothing.
MOST_ORDERED = 1_000_000


class Order(Protocol):
    """Which image and which text make a sample."""

    def at(self, number: int) -> tuple[int, int]:
        """The indices of the image and of the text of a sample."""

    @property
    def recipe(self) -> str:
        """A string that identifies this order."""


class Samples(Sequence[Sample]):
    """Any number of samples, made on demand; slices are views.

    groups: groups of all samples in this order for the standard error: as many as requested, or 0 if they would share
    images or texts. in_turn: samples are dealt round-robin, not in blocks. repeats: whether any image or text
    is used twice; the order is then valid only for these groups.
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
        """A short hash of the content of every pair in order; with repeats, of the items and the order's recipe."""
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
    """The number of groups for a standard error of these samples: `wanted`, or 0 if groups would share images or texts.

    in_turn: samples are dealt into groups round-robin, not in blocks.
    """
    if not isinstance(samples, Samples) or not samples.repeats:
        return wanted
    return wanted if (samples.groups, samples.in_turn) == (wanted, in_turn) else 0


def samples_digest(samples: Sequence[Sample]) -> str:
    """A short hash of the content of every pair in order; no file is read twice."""
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
    """Make `count` pairs of a random image and unrelated prose; too few items are reused in a new order each round.

    seed: if None, pairs are made in order, round after round.
    groups: groups of samples for a standard error, in blocks or `in_turn` (see `modality_integration.metric.dealing`).
    If anything repeats, images and texts are each split into `groups` parts and paired within a part, so that no two
    groups share any. With fewer distinct images or texts than groups, the result has `groups` 0.
    keys: identities of the images and of the texts; by default all differ. digests: of their content, if known.
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
    """Reorder samples in file order for groups that are blocks: randomly and, if any repeat, so that groups share no
    image and no text. If `groups` such groups do not exist, the samples stay in file order with groups 0.
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
    """Another order, permuted."""

    def __init__(self, order: Order, numbers: Sequence[int]) -> None:
        self._order, self._numbers = order, numbers

    def at(self, number: int) -> tuple[int, int]:
        return self._order.at(self._numbers[number])

    @property
    def recipe(self) -> str:
        return f"{self._order.recipe}, {hashlib.sha256(repr(self._numbers).encode()).hexdigest()}"


class InParts:
    """Images and texts split into one part per group of samples, paired at random round after round within a part.

    Sample n belongs to the group that `metric.dealing.dealt` deals it into.
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
    """The items of a part, repeated: first in their order, then in a new random order each round."""

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
    """The indices of each part's items: distinct keys are dealt round-robin, equal keys go into the same part."""
    part_of = {key: index % parts for index, key in enumerate(dict.fromkeys(keys))}
    dealt: list[list[int]] = [[] for _ in range(parts)]
    for index, key in enumerate(keys):
        dealt[part_of[key]].append(index)
    return dealt


def _keys_of(
    order: Order, keys: tuple[Sequence[Hashable], Sequence[Hashable]], count: int
) -> Iterator[tuple[Hashable, Hashable]]:
    """The keys of each sample's image and text."""
    for number in range(count):
        image, text = order.at(number)
        yield ("image", keys[0][image]), ("text", keys[1][text])


def _share_nothing(pairs: Iterator[tuple[Hashable, Hashable]], count: int, groups: int, in_turn: bool) -> bool:
    """Whether no key occurs in two groups of samples."""
    first: dict[Hashable, int] = {}
    for number, both in enumerate(itertools.islice(pairs, MOST_ORDERED + 1)):
        group = number % groups if in_turn else group_of(number, groups, count)
        if number == MOST_ORDERED or any(first.setdefault(key, group) != group for key in both):
            return False
    return True


def _packed(pairs: Sequence[tuple[Hashable, Hashable]], groups: int) -> list[int] | None:
    """An order of the samples in which groups, as blocks, share no key; None if none was found.

    Samples connected by shared keys, directly or through others, stay together. The largest such sets are placed first,
    each into the block with the most room; single samples fill the rest.
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
