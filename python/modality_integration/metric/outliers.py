"""The 3-sigma rule on token norms: over tokens in memory (two passes) and over a stream that passes by once.

MIR paper, section 2.1: occasional tokens with an unusually high l2 norm are taken out before the Fréchet distance.

What the rule cannot do: attention sinks (see `modality_integration.metric.sinks`) enter the standard deviation that
sets their own limit. If a fraction p of the tokens has one norm that lies D above all others, that deviation is at
least D sqrt(p (1 - p)), so they can be removed only if p (1 - p) < 1/9, p < 0.127: about one token in eight. If sinks
differ in strength, the strong ones set the limit and weaker ones stay at smaller fractions too. Removed or kept, they
widen the limits for all other tokens. sinks="leave out" takes them out before the limits are computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from modality_integration.metric.tokens import sent

# Norms are float32: tokens whose norms agree to a few of its roundings (as after a final RMSNorm with unit weight)
# are no outliers of one another, whatever the rule makes of the noise.
_ROUNDING = 8 * torch.finfo(torch.float32).eps
_MARKS = ("held", "released", "dropped")


class Limits(NamedTuple):
    """A token is kept where |norm - center| <= radius."""

    center: float
    radius: float

    def keep(self, norms: Tensor) -> Tensor:
        """Bool (n,): which of the norms (n,) lie within."""
        return (norms.double() - self.center).abs() <= self.radius

    def beyond(self, norms: Tensor) -> Tensor:
        """Bool (n,): which lie outside. Where norm, center or radius is NaN, a token is neither kept nor beyond."""
        return (norms.double() - self.center).abs() > self.radius

    def close_to(self, other: Limits) -> bool:
        """Whether both come from the same norms: sums in another order differ by rounding."""
        return all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(self, other, strict=True))


KEEP_ALL = Limits(0.0, math.inf)


def three_sigma(norms: Tensor) -> Limits:
    """Center and radius of the rule |norm - median(norms)| <= 3 std(norms), ddof 1, in float64.

    norms: float32 (n,), n >= 2. The median of an even count is the lower one. The rule does not change when all
    features are multiplied by a constant, so it is applied to norms before the scaling by alpha (Eq. 2).
    """
    if norms.dim() != 1 or norms.numel() < 2:
        raise ValueError(f"norms: takes shape (n,) with n >= 2, got {tuple(norms.shape)}")
    center = norms.median().item()
    radius = 3.0 * norms.double().std(correction=1).item()
    return Limits(center, max(radius, _ROUNDING * abs(center)))


def replace_by_column_medians(features: Tensor, outlier: Tensor) -> Tensor:
    """A copy of features (n, d) with the rows where `outlier` (n,) is True set to the (lower) medians of all n rows."""
    if not outlier.any():
        return features
    replaced = features.clone()
    replaced[outlier] = features.median(dim=0).values
    return replaced


class Marks(NamedTuple):
    """What is remembered of tokens: their norms (n,), float32, and the group of each one's sample (n,), uint8; CPU."""

    norms: Tensor
    groups: Tensor

    def where(self, mask: Tensor) -> Marks:
        """Those where the mask (n,) is True."""
        return Marks(self.norms[mask], self.groups[mask])

    @classmethod
    def cat(cls, parts: Iterable[Marks]) -> Marks:
        """One after the other."""
        none = Marks(torch.empty(0, dtype=torch.float32, device="cpu"), torch.empty(0, dtype=torch.uint8, device="cpu"))
        return cls(*(torch.cat(tensors) for tensors in zip(none, *parts, strict=True)))


class Released(NamedTuple):
    """Rows (m, d) that may be counted now, and the group of each one's sample, uint8 (m,) on the CPU."""

    rows: Tensor
    groups: Tensor


class Decision(NamedTuple):
    """How a stream's tokens fall once all of its norms are known.

    rows: the held rows that are kept, (h, d): to be counted beside what was released before.
    kept, removed: how many of all tokens are counted and left out.
    missed: how many of the counted tokens lie beyond the limits: they had been released when the limits were others.
    With limits other than those given from outside, also how many lie within that had been dropped on arrival.
    """

    rows: Tensor
    kept: int
    removed: int
    missed: int


class OnePass:
    """The 3-sigma rule over a stream: rows go in, rows that may be counted come out, the rest is decided at the end.

    All norms are kept (5 bytes a token with its group), so the limits are known exactly at the end. At most `hold` rows
    are held back, in a buffer of no more: whenever there would be more, those closest to the median of all norms so far
    are released until hold/2 are left, so what is held is always the most extreme part of the stream, and rows come out
    in large blocks. The kept set is that of the two-pass rule unless a row was released and the stream then moved away
    from it; `decide` counts such rows as `missed`. No row is ever removed that the rule keeps.

    hold: rows held back at most, after each push; 2 or more. limits: apply these (of a first pass over the same
    stream) instead: what lies beyond is dropped on arrival and nothing is missed. Limits(0, inf) keeps everything.
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype, *, hold: int, limits: Limits | None = None) -> None:
        if hold < 2:
            raise ValueError(f"hold: takes 2 rows or more, got {hold}")
        self.hidden_size, self.dtype, self.hold, self.limits = hidden_size, dtype, hold, limits
        # One buffer, and not the rows as they came: those would lie scattered over the heap between what is short-lived
        # and keep it from being given back.
        self._buffer: Tensor | None = None  # (capacity, d); the first `held` rows count
        self._held: list[Marks] = []  # of the held rows, in step with them
        self._released: list[Marks] = []
        self._dropped: list[Marks] = []
        self.held = 0  # rows held back now

    @property
    def held_bytes(self) -> int:
        """Memory allocated for the rows held back."""
        return 0 if self._buffer is None else self._buffer.nbytes

    @property
    def norms(self) -> Tensor:
        """Float32 norms of every token seen."""
        return self.norms_outside(None)

    def norms_outside(self, group: int | None) -> Tensor:
        """The norms of every token seen, or of those outside one group."""
        seen = self._seen()
        return seen.norms if group is None else seen.norms[seen.groups != group]

    @property
    def groups(self) -> list[int]:
        """The groups of which there are tokens, in order."""
        return self._seen().groups.unique().tolist()

    def released(self, group: int) -> int:
        """How many tokens of a group were released."""
        return sum(int((marks.groups == group).sum()) for marks in self._released)

    def count(self, without: int | None = None) -> int:
        """How many tokens were seen, in all or outside one group."""
        return len(self.norms_outside(without))

    @torch.inference_mode(False)  # the buffer outlives it
    def push(self, rows: Tensor, norms: Tensor, groups: Tensor | None = None) -> Released | None:
        """Take rows (n, d), their norms (n,), float32, and groups (n,), uint8, both on the CPU.

        groups: of each row's sample, all 0 if None. Returns the rows that may be counted now, or None.
        """
        marks = Marks(norms, torch.zeros(len(norms), dtype=torch.uint8, device="cpu") if groups is None else groups)
        if self.limits is not None:
            keep = self.limits.keep(norms)
            if not keep.all():
                _remember(self._dropped, marks.where(~keep))
                rows, marks = _take(rows, keep), marks.where(keep)
        if len(marks.norms) == 0:
            return None
        if self.held + len(rows) > self.hold:
            return self._release(rows, marks)
        self._append(rows)
        self._held.append(marks)
        return None

    def decide(self, without: int | None = None, limits: Limits | None = None) -> Decision:
        """Apply the rule to everything seen, or to all but one group; the stream stays as it is. Needs 2 tokens.

        limits: these, in place of those given from outside, or of those of the norms seen (without a group, the
        others').
        """
        seen, held, released = self._seen(), Marks.cat(self._held), Marks.cat(self._released)
        others = torch.ones(len(held.norms), dtype=torch.bool, device="cpu")
        if without is not None:
            others = held.groups != without
            seen, released = (marks.where(marks.groups != without) for marks in (seen, released))
        limits = limits or self.limits or three_sigma(seen.norms)
        keep = limits.keep(held.norms) & others
        rows = _take(self._rows(), keep)
        kept = int(keep.sum()) + len(released.norms)
        missed = int((~limits.keep(released.norms)).sum())
        if self._dropped and limits != self.limits:
            missed += int(limits.keep(Marks.cat(self._dropped).norms).sum())
        return Decision(rows, kept, len(seen.norms) - kept, missed)

    @torch.inference_mode(False)
    def merge(self, other: OnePass) -> None:
        """Take over what another stream of the same layer and modality holds; may exceed `hold` until the next push."""
        for name in ("_held", "_released", "_dropped"):
            getattr(self, name).extend(getattr(other, name))
        self._append(other._rows())

    @torch.inference_mode(False)
    def to(self, device: torch.device) -> None:
        """Move the held rows; norms stay on the CPU."""
        self._buffer = None if self._buffer is None else self._rows().to(device)

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors: `held` (h, d); norms and groups as `held_norms`, `held_groups` (h,), and so with `released`
        and `dropped`; `limits` (2,) or (0,).
        """
        limits = torch.tensor(self.limits or (), dtype=torch.float64, device="cpu")
        state = {"held": self._rows().clone(), "limits": limits}
        for name in _MARKS:
            marks = Marks.cat(getattr(self, f"_{name}"))
            state |= {f"{name}_norms": marks.norms, f"{name}_groups": marks.groups}
        return state

    @torch.inference_mode(False)
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state that `state_dict` gave; goes on with the same bits. ValueError, and nothing changes, if it
        is another's or was tampered with.
        """
        _check_state(state, self.hidden_size, self.dtype)
        self._buffer = state["held"].clone() if len(state["held"]) else None
        for name in _MARKS:
            marks = Marks(*(state[f"{name}_{kind}"].cpu().clone() for kind in ("norms", "groups")))
            setattr(self, f"_{name}", [marks] if len(marks.norms) else [])
        self.held = len(state["held_norms"])
        self.limits = Limits(*state["limits"].tolist()) if len(state["limits"]) else None

    def _seen(self) -> Marks:
        return Marks.cat([*self._released, *self._held, *self._dropped])

    def _release(self, rows: Tensor, marks: Marks) -> Released:
        """Takes in rows that are too many for the buffer and gives out the least extreme of all."""
        marks = Marks.cat([*self._held, marks])
        if self.limits is None:
            center = torch.cat([*(part.norms for part in self._released), marks.norms]).median().item()
        else:
            center = self.limits.center
        # Stable, so that equal norms are released in the order they came in, on every machine.
        order = torch.argsort((marks.norms.double() - center).abs(), stable=True)
        released = torch.ones(len(order), dtype=torch.bool, device="cpu")
        if self.limits != KEEP_ALL:  # under given limits too: `decide` may be asked for narrower ones
            released[order[len(order) - self.hold // 2 :]] = False
        parts, split = (self._rows() if self.held else rows[:0], rows), (self.held, len(rows))
        out, stay = (
            [_take(part, mask) for part, mask in zip(parts, which.split(split), strict=True)]
            for which in (released, ~released)
        )
        if self.held > self.hold:  # merged: a buffer of `hold` rows is enough again
            self._buffer = None
        self.held = 0
        for part in stay:
            self._append(part)
        self._held = [marks.where(~released)]
        _remember(self._released, marks.where(released))
        return Released(torch.cat(out), marks.groups[released])

    def _rows(self) -> Tensor:
        if self._buffer is None:
            return torch.empty(0, self.hidden_size, dtype=self.dtype, device="cpu")
        return self._buffer[: self.held]

    def _append(self, rows: Tensor) -> None:
        """Copy rows behind those that are held; a full buffer doubles, up to `hold` rows."""
        total, capacity = self.held + len(rows), 0 if self._buffer is None else len(self._buffer)
        if total > capacity:
            buffer = rows.new_empty(max(total, min(2 * capacity, self.hold)), self.hidden_size)
            buffer[: self.held] = self._rows()
            self._buffer = buffer
        if self._buffer is not None:
            self._buffer[self.held : total] = rows
        self.held = total


def _check_state(state: dict[str, Tensor], hidden_size: int, dtype: torch.dtype) -> None:
    expected = {"held", "limits", *(f"{name}_{kind}" for name in _MARKS for kind in Marks._fields)}
    if set(state) != expected:
        raise ValueError(f"state: takes the keys {sorted(expected)}, got {sorted(state)}")
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "held": (dtype, (state["held_norms"].numel(), hidden_size))
    }
    for name in _MARKS:
        norms = (state[f"{name}_norms"].numel(),)
        layout |= {f"{name}_norms": (torch.float32, norms), f"{name}_groups": (torch.uint8, norms)}
    layout["limits"] = (torch.float64, (2,) if state["limits"].numel() else (0,))
    for name, (kind, shape) in layout.items():
        got = (state[name].dtype, tuple(state[name].shape))
        if got != (kind, shape):
            raise ValueError(f"{name}: takes {kind} of shape {shape}, got {got[0]} of shape {got[1]}")
    for name in ("held", *(f"{name}_norms" for name in _MARKS)):
        if not bool(torch.isfinite(state[name]).all()) or (name != "held" and bool((state[name] < 0).any())):
            raise ValueError(f"{name}: takes {'finite rows' if name == 'held' else 'norms'}, got values that are none")
    if len(state["limits"]) and not (state["limits"][0].isfinite() and state["limits"][1] >= 0):
        raise ValueError(f"limits: takes a finite center and a radius, got {state['limits'].tolist()}")


def _remember(parts: list[Marks], marks: Marks) -> None:
    """Appends, and joins parts of like size: one small tensor for each release would pin the heap between them."""
    parts.append(marks)
    while len(parts) > 1 and len(parts[-2].norms) <= 2 * len(parts[-1].norms):
        last = parts.pop()
        parts[-1] = Marks.cat([parts[-1], last])


def _take(rows: Tensor, mask: Tensor) -> Tensor:
    # By index: indexing with a mask would wait for the device to count it.
    return rows.index_select(0, sent(mask.nonzero().flatten(), rows.device))
