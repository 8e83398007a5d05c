"""The 3-sigma rule on token norms: over tokens in memory (two passes) and over a stream that passes by once.

MIR paper, section 2.1: occasional tokens with an unusually high l2 norm are taken out before the Fréchet distance.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Norms are float32: tokens whose norms agree to a few of its roundings (as after a final RMSNorm with unit weight)
# are no outliers of one another, whatever the rule makes of the noise.
_ROUNDING = 8 * torch.finfo(torch.float32).eps


class Limits(NamedTuple):
    """A token is kept where |norm - center| <= radius."""

    center: float
    radius: float

    def keep(self, norms: Tensor) -> Tensor:
        """Bool (n,): which of the norms (n,) lie within."""
        return (norms.double() - self.center).abs() <= self.radius

    def close_to(self, other: Limits) -> bool:
        """Whether both come from the same norms: sums in another order differ by rounding."""
        return all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(self, other, strict=True))


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


class Decision(NamedTuple):
    """How a stream's tokens fall once all of its norms are known.

    rows: the held rows that are kept, (h, d): to be counted beside what was released before.
    kept, removed: how many of all tokens are counted and left out.
    missed: how many of the counted tokens lie beyond the limits: they had been released when the limits were others.
    """

    rows: Tensor
    kept: int
    removed: int
    missed: int


class OnePass:
    """The 3-sigma rule over a stream: rows go in, rows that may be counted come out, the rest is decided at the end.

    All norms are kept (4 bytes a token), so the limits are known exactly at the end. At most `hold` rows are held back:
    whenever there are more, those closest to the median of all norms so far are released until hold/2 are left, so
    what is held is always the most extreme part of the stream, and rows come out in large blocks. The kept set is that
    of the two-pass rule unless a row was released and the stream then moved away from it; `decide` counts such rows as
    `missed`. No row is ever removed that the rule keeps.

    hold: rows held back at most, after each push; 2 or more. limits: apply these (of a first pass over the same
    stream) instead: what lies beyond is dropped on arrival and nothing is missed. Limits(0, inf) keeps everything.
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype, *, hold: int, limits: Limits | None = None) -> None:
        if hold < 2:
            raise ValueError(f"hold: takes 2 rows or more, got {hold}")
        self.hidden_size, self.dtype, self.hold, self.limits = hidden_size, dtype, hold, limits
        self._rows: list[Tensor] = []
        self._norms: list[Tensor] = []  # of the held rows, in step with them
        self._released: list[Tensor] = []
        self._dropped: list[Tensor] = []
        self.held = 0  # rows held back now

    @property
    def norms(self) -> Tensor:
        """Float32 norms of every token seen."""
        return torch.cat([*self._released, *self._norms, *self._dropped, torch.empty(0)])

    @property
    def all_held(self) -> bool:
        """Whether no row has been released yet, so that the features themselves are still at hand."""
        return not self._released

    def push(self, rows: Tensor, norms: Tensor) -> Tensor | None:
        """Take rows (n, d), which the stream then owns, and their norms (n,), float32 on the CPU.

        Returns the rows that may be counted now, (m, d), or None.
        """
        if self.limits is not None:
            keep = self.limits.keep(norms)
            if not keep.all():
                self._dropped.append(norms[~keep])
                rows, norms = _take(rows, keep), norms[keep]
        if len(norms) == 0:
            return None
        self._rows.append(rows)
        self._norms.append(norms)
        self.held += len(norms)
        return self._release() if self.held > self.hold else None

    def decide(self) -> Decision:
        """Apply the rule to everything seen; the stream itself stays as it is. Needs 2 tokens."""
        norms, held, released = self.norms, _cat(self._norms), _cat(self._released)
        limits = self.limits or three_sigma(norms)
        keep = limits.keep(held)
        rows = self._cat_rows([_take(part, mask) for part, mask in self._split(keep)])
        kept = int(keep.sum()) + len(released)
        return Decision(rows, kept, len(norms) - kept, int((~limits.keep(released)).sum()))

    def merge(self, other: OnePass) -> None:
        """Take over what another stream of the same layer and modality holds; may exceed `hold` until the next push."""
        for name in ("_rows", "_norms", "_released", "_dropped"):
            getattr(self, name).extend(getattr(other, name))
        self.held += other.held

    def to(self, device: torch.device) -> None:
        """Move the held rows; norms stay on the CPU."""
        self._rows = [part.to(device) for part in self._rows]

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors: `held` (h, d), `held_norms` (h,), `released_norms`, `dropped_norms`, `limits` (2,) or (0,)."""
        return {
            "held": self._cat_rows(self._rows),
            "held_norms": _cat(self._norms),
            "released_norms": _cat(self._released),
            "dropped_norms": _cat(self._dropped),
            "limits": torch.tensor(self.limits or (), dtype=torch.float64),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state that `state_dict` gave; goes on with the same bits."""
        self._rows = [state["held"].clone()] if len(state["held"]) else []
        for name, key in (("_norms", "held_norms"), ("_released", "released_norms"), ("_dropped", "dropped_norms")):
            setattr(self, name, [state[key].cpu().clone()] if len(state[key]) else [])
        self.held = len(state["held_norms"])
        self.limits = Limits(*state["limits"].tolist()) if len(state["limits"]) else None

    def _release(self) -> Tensor:
        norms = _cat(self._norms)
        center = self.norms.median().item() if self.limits is None else 0.0
        # Stable, so that equal norms are released in the order they came in, on every machine.
        order = torch.argsort((norms.double() - center).abs(), stable=True)
        released = torch.ones(len(norms), dtype=torch.bool)
        if self.limits is None:
            released[order[len(norms) - self.hold // 2 :]] = False
        out = self._cat_rows([_take(part, mask) for part, mask in self._split(released)])
        self._rows = [self._cat_rows([_take(part, mask) for part, mask in self._split(~released)])]
        self._norms = [norms[~released]]
        self._released.append(norms[released])
        self.held = len(self._norms[0])
        return out

    def _cat_rows(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts) if parts else torch.empty(0, self.hidden_size, dtype=self.dtype)

    def _split(self, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self._rows, mask.split([len(part) for part in self._rows]), strict=True))


def _cat(norms: list[Tensor]) -> Tensor:
    return torch.cat([*norms, torch.empty(0)])


def _take(rows: Tensor, mask: Tensor) -> Tensor:
    # By index: indexing with a mask would wait for the device to count it.
    return rows.index_select(0, mask.nonzero().flatten().to(rows.device))
