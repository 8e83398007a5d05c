"""Attention sinks: detection, and separate storage in a stream.

A decoder parks unneeded attention on a few tokens, mainly the first of a sequence (Xiao et al., Efficient Streaming
Language Models with Attention Sinks, arXiv 2309.17453; position 0 in more than 98 % of the cases in Sun et al., arXiv
2603.05498; background vision tokens in Kang et al., arXiv 2503.03321). Such a token has a massive activation: a few of
its channels are orders of magnitude above everything else and nearly independent of the input, so its state carries no
information about an image or a text. A handful of them can make up nearly all of a Fréchet distance.

The rule. In one layer, a token is *massive* if its norm exceeds `TIMES` times the median norm of the counted tokens
of its own sample, vision and text together, and `FEW` channels hold at least `SHARE` of its squared norm. Sun et al.
(Massive Activations in Large Language Models, arXiv 2402.17762) require an activation above 100 and above 1000 times
the median magnitude of the hidden state. Here the median norm replaces the median magnitude, because norms are already
available while the median of n d numbers per layer is not; in SmolLM2 (d = 576), whose sinks have 20 to 190 times the
median norm, the two agree. The absolute threshold of 100 is dropped, because MIR is invariant to scaling all features.
If a modality of a sample has such a token, its equally concentrated tokens above `NEARBY` times the median also count:
an image at the position of a sink spreads that role over its first few tokens. Each sample is judged on its own, so the
result does not depend on other samples, batch size, order or the number of processes.

A token that is massive in any layer is a *sink* in every layer: massive activations persist from the layer where they
appear to the last ones, and after those (behind the final norm) the token is no more informative.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mir_kernels import _checks
from mir_kernels.ops.moments.state import number
from modality_integration.metric.outliers import KEEP_ALL, Decision, Limits, OnePass, three_sigma
from modality_integration.metric.tokens import sent

TIMES, NEARBY = 20.0, 5.0
FEW, SHARE = 4, 0.9


def massive_tokens(
    norms: Tensor, masks: Mapping[str, Tensor], concentrated_at: Callable[[int, Tensor], Tensor]
) -> Tensor | None:
    """Bool (K, ..., T), CPU: which tokens are massive in which layer; None if none are.

    norms: (K, ..., T) of all layers' tokens, on the CPU; each row of T is one sample. masks: bool (..., T), the tokens
    of each modality. concentrated_at(k, places): `concentrated` for layer k's tokens at places (n, ...) of (..., T); it
    is called only for the few tokens with a large norm.
    """
    if norms.numel() == 0:  # empty sequences have no median
        return None
    counted = torch.stack(list(masks.values())).any(0)
    median = norms.masked_fill(~counted, torch.nan).nanmedian(dim=-1, keepdim=True).values
    times = (norms / median).masked_fill(~counted | (median <= 0), 0.0)
    candidates = torch.zeros_like(times, dtype=torch.bool)
    for mask in masks.values():
        candidates |= (times > NEARBY) & mask & _with_large(times, mask)
    layers = candidates.flatten(1).any(1).nonzero().flatten().tolist()
    if not layers:
        return None
    places = [candidates[k].nonzero() for k in layers]
    found = [concentrated_at(k, place) for k, place in zip(layers, places, strict=True)]
    for k, place, of_few in zip(layers, places, found, strict=True):  # copy to the CPU only after all layers are queued
        candidates[k][tuple(place.unbind(1))] = of_few.cpu()
    for mask in masks.values():
        candidates &= ~mask | _with_large(times * candidates, mask)
    return candidates if candidates.any() else None


def concentrated(rows: Tensor) -> Tensor:
    """Bool (n,): whether `FEW` channels (at most d / 8) hold `SHARE` of a row's squared norm. rows: (n, d)."""
    few = min(FEW, rows.shape[-1] // 8)
    squares = rows.double().square()
    return squares.topk(few, dim=-1).values.sum(-1) >= SHARE * squares.sum(-1) if few else squares.sum(-1) < 0


class SinkMarks(NamedTuple):
    """For n tokens in one layer: bool (n,) for sinks and for massive tokens in this layer, int32 positions; CPU.

    positions: the token's position in its sequence, (n,); (0,) if unknown.
    """

    sink: Tensor
    massive: Tensor
    positions: Tensor


def no_sinks(count: int) -> SinkMarks:
    """Marks of `count` tokens without sinks; positions are arbitrary."""
    none = torch.zeros(count, dtype=torch.bool, device="cpu")
    return SinkMarks(none, none, torch.zeros(count, dtype=torch.int32, device="cpu"))


def tally(positions: Tensor) -> dict[int, int]:
    """The number of tokens at each position, largest count first."""
    return dict(Counter(positions.tolist()).most_common())


def _with_large(times: Tensor, mask: Tensor) -> Tensor:
    """Bool (..., 1): samples with a token in the mask that exceeds `TIMES` times the median in any layer."""
    return ((times > TIMES) & mask).any(0).any(-1, keepdim=True)


class SinkTokens:
    """The sinks of one layer and modality, stored separately from the other tokens.

    hold: maximum number of rows; further sinks are not stored, only counted in `beyond`. With 0, sinks are left out: no
    rows are stored, but norms, groups and positions are.
    """

    _FIELDS = ("norms", "groups", "positions", "massive")
    _DTYPES = (torch.float32, torch.uint8, torch.int32, torch.uint8)

    def __init__(self, hidden_size: int, dtype: torch.dtype, *, hold: int) -> None:
        self.hidden_size, self.dtype, self.hold = hidden_size, dtype, hold
        self.rows = torch.empty(0, hidden_size, dtype=dtype, device="cpu")
        self.norms, self.groups, self.positions, self.massive = (
            torch.empty(0, dtype=kind, device="cpu") for kind in self._DTYPES
        )
        self.beyond = 0

    def __len__(self) -> int:
        return len(self.norms)

    @torch.inference_mode(False)  # the rows outlive inference mode
    def push(self, rows: Tensor, norms: Tensor, groups: Tensor, marks: SinkMarks) -> Tensor:
        """Store the sinks among n tokens. Returns bool (n,), CPU: tokens not stored, for the caller to count."""
        index = marks.sink.nonzero().flatten()
        if self.hold:
            taken = index[: max(self.hold - len(self), 0)]
            self.beyond += len(index) - len(taken)
            index = taken
        if len(index):
            if self.hold:
                self.rows = torch.cat([self.rows.to(rows.device), rows[index.to(rows.device)]])
            parts = (norms, groups, marks.positions, marks.massive.byte())
            for name, part in zip(self._FIELDS, parts, strict=True):
                setattr(self, name, torch.cat([getattr(self, name), part[index]]))
        others = torch.ones(len(norms), dtype=torch.bool, device="cpu")
        others[index] = False
        return others

    def within(self, limits: Limits, without: int | None = None) -> Tensor:
        """Bool (len,): the sinks within the outlier limits and outside one group."""
        keep = limits.keep(self.norms)
        return keep if without is None else keep & (self.groups != without)

    def norms_outside(self, group: int | None) -> Tensor:
        """The norms of all sinks, or of those outside one group."""
        return self.norms if group is None else self.norms[self.groups != group]

    def where(self) -> dict[int, int]:
        """The number of sinks at each position, largest count first."""
        return tally(self.positions)

    def merge(self, other: SinkTokens) -> None:
        """Add the sinks of another store of the same layer and modality; may exceed `hold` afterwards."""
        if len(other.rows):  # an empty store is on the CPU, whatever the device
            self.rows = torch.cat([self.rows.to(other.rows.device), other.rows])
        for name in self._FIELDS:
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))
        self.beyond += other.beyond

    def to(self, device: torch.device) -> None:
        """Move the rows."""
        self.rows = self.rows.to(device)

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors: `held` (h, d); `norms`, `groups`, `positions`, `massive` (n,) each; `beyond`, a number."""
        state = {name: getattr(self, name) for name in self._FIELDS}
        return {"held": self.rows.clone(), **state, "beyond": number(self.beyond)}

    @torch.inference_mode(False)
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a `state_dict`. For an invalid state, ValueError, and nothing changes."""
        expected = {"held", "beyond", *self._FIELDS}
        if set(state) != expected:
            raise ValueError(f"state: expected the keys {sorted(expected)}, got {sorted(state)}")
        count = state["norms"].numel()
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            name: (dtype, (count,)) for name, dtype in zip(self._FIELDS, self._DTYPES, strict=True)
        }
        layout |= {"held": (self.dtype, (count if self.hold else 0, self.hidden_size))}
        for name, (dtype, shape) in layout.items():
            got = (state[name].dtype, tuple(state[name].shape))
            if got != (dtype, shape):
                raise ValueError(f"{name}: expected {dtype} of shape {shape}, got {got[0]} of shape {got[1]}")
        for name in ("norms", "held"):
            if not bool(state[name].isfinite().all()) or (name == "norms" and bool((state[name] < 0).any())):
                raise ValueError(f"{name}: expected finite numbers, and norms >= 0")
        if bool((state["positions"] < 0).any()) or bool((state["massive"] > 1).any()):
            raise ValueError("positions, massive: expected positions >= 0, and 0 or 1")
        beyond = _checks.whole_number("beyond", state["beyond"])
        for name in self._FIELDS:
            setattr(self, name, state[name].cpu().clone())
        self.rows, self.beyond = state["held"].clone(), beyond


class ModalityTokens:
    """The tokens of one modality in one layer of a stream: sinks separately, others under the one-pass outlier rule.

    counts_sinks: whether sinks count, as in the paper; the outlier rule then applies to them too, with limits from all
    norms. hold, limits: as for `OnePass`.
    """

    def __init__(
        self, hidden_size: int, dtype: torch.dtype, *, hold: int, limits: Limits | None, counts_sinks: bool
    ) -> None:
        self.counts_sinks = counts_sinks
        self.others = OnePass(hidden_size, dtype, hold=hold, limits=limits)
        self.sinks = SinkTokens(hidden_size, dtype, hold=hold if counts_sinks else 0)

    @property
    def limits(self) -> Limits | None:
        """The limits given on construction."""
        return self.others.limits

    @property
    def final_limits(self) -> Limits:
        """The 3-sigma limits of all counted tokens so far."""
        return three_sigma(self._norms(None, self.counts_sinks))

    @property
    def held_bytes(self) -> int:
        """Memory allocated for the rows held back."""
        return self.others.held_bytes + self.sinks.rows.nbytes

    def split(
        self, rows: Tensor, norms: Tensor, groups: Tensor, marks: SinkMarks | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Store the sinks among the tokens; returns the remaining tokens, to be pushed to `others`."""
        if marks is None or not marks.sink.any():
            return rows, norms, groups
        index = self.sinks.push(rows, norms, groups, marks).nonzero().flatten()
        return rows.index_select(0, sent(index, rows.device)), norms[index], groups[index]

    def count(self, without: int | None = None) -> int:
        """How many tokens that may count were seen, in total or outside one group."""
        return len(self._norms(without, self.counts_sinks))

    def decide(self, without: int | None = None, *, sinks: bool | None = None) -> Decision:
        """Apply the outlier rule to everything seen, or to all but one group; does not change the stream. Needs 2
        tokens.

        sinks: whether sinks count; None means `counts_sinks`.
        """
        sinks = self.counts_sinks if sinks is None else sinks
        limits = self._limits(without, sinks)
        decision = self.others.decide(without, limits)
        if not sinks or len(self.sinks) == 0:
            return decision
        seen, keep = len(self.sinks.norms_outside(without)), self.sinks.within(limits, without)
        kept, rows = int(keep.sum()), self.sinks.rows[sent(keep, self.sinks.rows.device)]
        rows = torch.cat([decision.rows.to(rows.device), rows])
        return Decision(rows, decision.kept + kept, decision.removed + seen - kept, decision.missed)

    @property
    def groups(self) -> list[int]:
        """The groups that have tokens that may count, sorted."""
        apart = self.sinks.groups.unique().tolist() if self.counts_sinks else []
        return sorted({*self.others.groups, *apart})

    def massive(self) -> int:
        """How many counted tokens are massive in this layer; with sinks left out, how many of them are."""
        if len(self.sinks) == 0:
            return 0
        massive = self.sinks.massive.bool()
        if self.counts_sinks:
            massive = massive & self.sinks.within(self._limits(None, sinks=True))
        return int(massive.sum())

    def merge(self, other: ModalityTokens) -> None:
        """Add the tokens of another stream of the same layer and modality."""
        self.others.merge(other.others)
        self.sinks.merge(other.sinks)

    def to(self, device: torch.device) -> None:
        """Move the held rows."""
        self.others.to(device)
        self.sinks.to(device)

    def state_dict(self) -> dict[str, Tensor]:
        """The keys of OnePass, and those of SinkTokens under `sinks.`."""
        return self.others.state_dict() | {f"sinks.{key}": value for key, value in self.sinks.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a `state_dict`. ValueError if it is invalid."""
        self.others.load_state_dict({key: value for key, value in state.items() if not key.startswith("sinks.")})
        own = {key.removeprefix("sinks."): value for key, value in state.items() if key.startswith("sinks.")}
        try:
            self.sinks.load_state_dict(own)
        except (TypeError, ValueError) as error:
            raise type(error)(f"sinks: {error}") from error

    def _norms(self, without: int | None, sinks: bool) -> Tensor:
        norms, apart = self.others.norms_outside(without), self.sinks.norms_outside(without)
        return torch.cat([norms, apart]) if sinks and len(apart) else norms

    def _limits(self, without: int | None, sinks: bool) -> Limits:
        given = self.limits
        if given is not None and (given == KEEP_ALL or sinks == self.counts_sinks):
            return given
        return three_sigma(self._norms(without, sinks))
