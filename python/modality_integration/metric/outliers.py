"""The 3-sigma rule on token norms, for tokens in memory (two passes) and for a stream (one pass).

MIR paper, section 2.1: occasional tokens with an unusually high l2 norm are removed before the Fréchet distance.

A limitation of the rule: attention sinks (see `modality_integration.metric.sinks`) contribute to the standard deviation
that sets their own limit. If a fraction p of the tokens has a norm D above all others, that deviation is at least
D sqrt(p (1 - p)), so they can be removed only if p (1 - p) < 1/9, p < 0.127: about one token in eight. If sinks differ
in strength, the strong ones set the limit and weaker ones remain even at smaller fractions. Removed or kept, they widen
the limits for all other tokens. sinks="leave out" removes them before the limits are computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from modality_integration.metric.tokens import sent

# Norms are float32: if they agree to within a few roundings (as after a final RMSNorm with unit weight), none of them
# may become an outlier because of rounding noise.
_ROUNDING = 8 * torch.finfo(torch.float32).eps
_MARKS = ("held", "released", "dropped")


class Limits(NamedTuple):
    """A token is kept where |norm - center| <= radius."""

    center: float
    radius: float

    def keep(self, norms: Tensor) -> Tensor:
        """Bool (n,): which of the norms (n,) lie within the limits."""
        return (norms.double() - self.center).abs() <= self.radius

    def beyond(self, norms: Tensor) -> Tensor:
        """Bool (n,): which lie outside. If norm, center or radius is NaN, a token is neither kept nor beyond."""
        return (norms.double() - self.center).abs() > self.radius

    def close_to(self, other: Limits) -> bool:
        """Whether both come from the same norms, up to rounding from the order of summation."""
        return all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(self, other, strict=True))


KEEP_ALL = Limits(0.0, math.inf)


def three_sigma(norms: Tensor) -> Limits:
    """Center and radius of the rule |norm - median(norms)| <= 3 std(norms), ddof 1, in float64.

    norms: float32 (n,), n >= 2. The median of an even count is the lower one. The rule does not change when all
    features are multiplied by a constant, so it is applied to norms before the scaling by alpha (Eq. 2).
    """
    if norms.dim() != 1 or norms.numel() < 2:
        raise ValueError(f"norms: expected shape (n,) with n >= 2, got {tuple(norms.shape)}")
    center = norms.median().item()
    radius = 3.0 * norms.double().std(correction=1).item()
    return Limits(center, max(radius, _ROUNDING * abs(center)))


def replace_by_column_medians(features: Tensor, outlier: Tensor) -> Tensor:
    """Features (n, d) with the rows where `outlier` (n,) is True replaced by the (lower) column medians of all n rows.

    Returns a copy unless nothing is replaced.
    """
    if not outlier.any():
        return features
    replaced = features.clone()
    replaced[outlier] = features.median(dim=0).values
    return replaced


class Marks(NamedTuple):
    """Record of tokens: their norms (n,), float32, and the group of each token's sample (n,), uint8; on the CPU."""

    norms: Tensor
    groups: Tensor

    def where(self, mask: Tensor) -> Marks:
        """The entries where the mask (n,) is True."""
        return Marks(self.norms[mask], self.groups[mask])

    @classmethod
    def cat(cls, parts: Iterable[Marks]) -> Marks:
        """Concatenate `parts`, which may be empty."""
        none = Marks(torch.empty(0, dtype=torch.float32, device="cpu"), torch.empty(0, dtype=torch.uint8, device="cpu"))
        return cls(*(torch.cat(tensors) for tensors in zip(none, *parts, strict=True)))


class Released(NamedTuple):
    """Rows (m, d) that may be counted now, and the group of each row's sample, uint8 (m,), on the CPU."""

    rows: Tensor
    groups: Tensor


class Decision(NamedTuple):
    """The outcome of the rule for a stream once all of its norms are known.

    rows: the held rows that are kept, (h, d), to be counted in addition to those released before.
    kept, removed: how many of all tokens are counted and removed.
    missed: how many counted tokens lie beyond the limits, because they were released under earlier limits. If the
    limits differ from the given ones, tokens that were dropped on arrival but lie within the limits are included.
    """

    rows: Tensor
    kept: int
    removed: int
    missed: int


class OnePass:
    """The 3-sigma rule over a stream: releases rows that are safe to count and decides the rest at the end.

    All norms are kept (5 bytes per token including its group), so the final limits are exact. At most `hold` rows are
    held back. When there would be more, those closest to the median of all norms so far are released until hold/2 are
    left, so the held rows are always the most extreme part of the stream, and rows are released in large blocks. The
    kept set is that of the two-pass rule unless a row was released and the stream then drifted away from it; `decide`
    counts such rows as `missed`. A row that the rule keeps is never removed.

    hold: maximum number of rows held back after each push; 2 or more. limits: use these (from a first pass over the
    same stream): rows beyond them are dropped on arrival and nothing is missed. Limits(0, inf) keeps everything.
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype, *, hold: int, limits: Limits | None = None) -> None:
        if hold < 2:
            raise ValueError(f"hold: expected 2 rows or more, got {hold}")
        self.hidden_size, self.dtype, self.hold, self.limits = hidden_size, dtype, hold, limits
        # One buffer instead of the incoming tensors, which would fragment the heap and keep memory from being freed.
        self._buffer: Tensor | None = None  # (capacity, d); the first `held` rows count
        self._held: list[Marks] = []  # of the held rows, in the same order
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
        """The norms of all tokens seen, or of those outside one group."""
        seen = self._seen()
        return seen.norms if group is None else seen.norms[seen.groups != group]

    @property
    def groups(self) -> list[int]:
        """The groups that have tokens, sorted."""
        return self._seen().groups.unique().tolist()

    def released(self, group: int) -> int:
        """How many tokens of a group have been released."""
        return sum(int((marks.groups == group).sum()) for marks in self._released)

    def count(self, without: int | None = None) -> int:
        """How many tokens were seen, in total or outside one group."""
        return len(self.norms_outside(without))

    @torch.inference_mode(False)  # the buffer outlives inference mode
    def push(self, rows: Tensor, norms: Tensor, groups: Tensor | None = None) -> Released | None:
        """Add rows (n, d) with their norms (n,), float32, and groups (n,), uint8, both on the CPU.

        groups: the group of each row's sample, all 0 if None. Returns the rows that may be counted now, or None.
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
        """Apply the rule to everything seen, or to all but one group; does not change the stream. Needs 2 tokens.

        limits: override the given limits, or those computed from the norms seen (outside the group).
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
        """Add the tokens of another stream of the same layer and modality; may exceed `hold` until the next push."""
        for name in ("_held", "_released", "_dropped"):
            getattr(self, name).extend(getattr(other, name))
        self._append(other._rows())

    @torch.inference_mode(False)
    def to(self, device: torch.device) -> None:
        """Move the held rows; norms stay on the CPU."""
        self._buffer = None if self._buffer is None else self._rows().to(device)

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors: `held` (h, d), its norms and groups as `held_norms` and `held_groups` (h,), likewise for
        `released` and `dropped`; `limits` (2,) or (0,).
        """
        limits = torch.tensor(self.limits or (), dtype=torch.float64, device="cpu")
        state = {"held": self._rows().clone(), "limits": limits}
        for name in _MARKS:
            marks = Marks.cat(getattr(self, f"_{name}"))
            state |= {f"{name}_norms": marks.norms, f"{name}_groups": marks.groups}
        return state

    @torch.inference_mode(False)
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a `state_dict`; continuing from it is bit-identical. For an invalid state, ValueError, and nothing
        changes.
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
        """Add rows that overflow the buffer; returns the least extreme of all."""
        marks = Marks.cat([*self._held, marks])
        if self.limits is None:
            center = torch.cat([*(part.norms for part in self._released), marks.norms]).median().item()
        else:
            center = self.limits.center
        # Stable, so that equal norms are released in order of arrival on every platform.
        order = torch.argsort((marks.norms.double() - center).abs(), stable=True)
        released = torch.ones(len(order), dtype=torch.bool, device="cpu")
        if self.limits != KEEP_ALL:  # even under given limits, as `decide` may use narrower ones
            released[order[len(order) - self.hold // 2 :]] = False
        parts, split = (self._rows() if self.held else rows[:0], rows), (self.held, len(rows))
        out, stay = (
            [_take(part, mask) for part, mask in zip(parts, which.split(split), strict=True)]
            for which in (released, ~released)
        )
        if self.held > self.hold:  # grown by a merge: shrink back to `hold` rows
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
        """Append rows to the buffer; a full buffer doubles, up to `hold` rows."""
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
        raise ValueError(f"state: expected the keys {sorted(expected)}, got {sorted(state)}")
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
            raise ValueError(f"{name}: expected {kind} of shape {shape}, got {got[0]} of shape {got[1]}")
    for name in ("held", *(f"{name}_norms" for name in _MARKS)):
        if not bool(torch.isfinite(state[name]).all()) or (name != "held" and bool((state[name] < 0).any())):
            raise ValueError(f"{name}: expected {'finite rows' if name == 'held' else 'finite norms >= 0'}")
    if len(state["limits"]) and not (state["limits"][0].isfinite() and state["limits"][1] >= 0):
        raise ValueError(f"limits: expected a finite center and a radius >= 0, got {state['limits'].tolist()}")


def _remember(parts: list[Marks], marks: Marks) -> None:
    """Append, joining parts of similar size: many small tensors would fragment the heap."""
    parts.append(marks)
    while len(parts) > 1 and len(parts[-2].norms) <= 2 * len(parts[-1].norms):
        last = parts.pop()
        parts[-1] = Marks.cat([parts[-1], last])


def _take(rows: Tensor, mask: Tensor) -> Tensor:
    # By index: indexing with a mask would synchronise with the device.
    return rows.index_select(0, sent(mask.nonzero().flatten(), rows.device))
