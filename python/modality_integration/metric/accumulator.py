"""One layer of a stream: vision and text tokens on their way into means and covariances, by groups of samples."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mir_kernels import StreamingMoments, _checks
from mir_kernels.ops.moments.packed import entries
from modality_integration.metric import MODALITIES
from modality_integration.metric.distance import FeatureMoments, GaussianPair, TokenMoments
from modality_integration.metric.group_moments import GroupMoments, Slot, prefix_of, slots
from modality_integration.metric.host_memory import HostMemory
from modality_integration.metric.layer import CountedTokens, LayerResult, layer_results
from modality_integration.metric.options import MetricOptions, Precision
from modality_integration.metric.outliers import KEEP_ALL, Decision, Limits
from modality_integration.metric.sinks import ModalityTokens, SinkMarks
from modality_integration.metric.tokens import alpha_of, require_tokens, roundings_of_norms, sent, sum_of_norms

# Rows held back in a stream while they might turn out to be outliers; at least one more than the hidden size, so that
# a covariance short of rank is never formed: its root is taken from the features instead.
HOLD = 2048


class LayerAccumulator:
    """Both modalities of layer `layer` (1..K): `push` rows as they come, `result` at any time.

    Holds an accumulator a modality and group of samples (a triangle of d^2 / 2 float64 numbers each; one group without
    `options.groups`), made when the first rows are released, and at most `hold` rows a modality. limits: the outlier
    limits of a first pass over the same tokens, by modality.

    host: where the accumulators of finished groups are put, if groups come one after the other (`options.samples`) and
    it is for this device. Rows of theirs that come out of the held ones later, at most `hold` a group, wait with them.

    Attention sinks are kept apart, `hold` rows a modality at most, so that the distance without them is known as well;
    with `options.sinks` "leave out" no row of them is kept.
    """

    def __init__(
        self,
        layer: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        options: MetricOptions,
        limits: Mapping[str, Limits] | None = None,
        host: HostMemory | None = None,
    ) -> None:
        self.layer, self.hidden_size, self.dtype, self.device = layer, hidden_size, dtype, device
        self.options, self._host = options, host
        self.hold = hold = max(options.hold or HOLD, hidden_size + 1)
        everything = KEEP_ALL if options.outliers == "none" else None
        self.tokens = {
            m: ModalityTokens(
                hidden_size,
                dtype,
                hold=hold,
                limits=limits[m] if limits else everything,
                counts_sinks=options.counts_sinks,
            )
            for m in MODALITIES
        }
        self.moments = self.accumulators(options.precision, host)
        # Sums, by group, without the sinks'.
        self.text_norms = torch.zeros(max(options.groups, 1), dtype=torch.float64, device=device)

    @property
    def final_limits(self) -> dict[str, Limits]:
        """The 3-sigma limits of all counted tokens so far, by modality."""
        return {m: self.tokens[m].final_limits for m in MODALITIES}

    @property
    def held_bytes(self) -> int:
        """Memory allocated for the rows held back."""
        return sum(self.tokens[m].held_bytes for m in MODALITIES)

    @property
    def moves(self) -> bool:
        """Whether finished groups' accumulators are put into host memory."""
        return self._in_blocks and self.moments.moves

    @property
    def keeps_all(self) -> bool:
        """Whether no token counts as an outlier."""
        return all(self.tokens[m].limits == KEEP_ALL for m in MODALITIES)

    def push(
        self,
        modality: str,
        rows: Tensor,
        norms: Tensor,
        groups: Tensor | None = None,
        marks: SinkMarks | None = None,
    ) -> None:
        """Take rows (n, d), and on the CPU their norms (n,), float32, and the group of each one's sample (n,), uint8,
        below `options.groups`; None is group 0 for all. marks: which are attention sinks; None where none is.
        """
        rows = rows.to(self.device)
        if groups is None:
            groups = torch.zeros(len(norms), dtype=torch.uint8, device="cpu")
        rows, norms, groups = self.tokens[modality].split(rows, norms, groups, marks)
        if modality == "text":
            added = torch.zeros_like(self.text_norms)
            for group, part in _by_group(rows, groups):
                added[group] = sum_of_norms(part)
            self.text_norms = self.text_norms + added
        released = self.tokens[modality].others.push(rows, norms, groups)
        oldest, newest = self._turn_to(modality, groups)
        if released is not None:
            for group, part in _by_group(released.rows, released.groups):
                self.moments.update((modality, group), part)
                if oldest <= group < newest:  # a batch of several groups: one of them at a time
                    self.moments.put_away((modality, group))

    def result(self) -> LayerResult:
        """The distance over all that was pushed; the tokens stay as they are."""
        (result,) = layer_results([self], self.options)
        return result

    def counted(self) -> CountedTokens:
        """All tokens, the held rows as the outlier rule decides. ValueError where they are too few."""
        layer = self.layer
        for modality in MODALITIES:
            require_tokens(self.tokens[modality].count(), layer, modality)
        decisions = {m: self.tokens[m].decide() for m in MODALITIES}
        for modality, decision in decisions.items():
            require_tokens(decision.kept, layer, f"{modality} within the outlier limits")
        notes = [
            f"layer {layer}, {modality}: {decision.missed} tokens beyond the final 3-sigma limits had already been "
            "counted (the norms moved while the stream passed): a larger hold, or a second pass, makes this exact"
            for modality, decision in decisions.items()
            if decision.missed
        ]
        notes += [
            f"layer {layer}, {modality}: the second pass saw other tokens than the first pass, whose limits it applied"
            for modality, tokens in self.tokens.items()
            if tokens.limits not in (None, KEEP_ALL) and not tokens.limits.close_to(self.final_limits[modality])
        ]
        without_sinks, known, on_sinks = self._without_sinks()
        return CountedTokens(
            self.pair(decisions, self.moments, self.text_norm_sums(self.options.counts_sinks).sum()),
            kept={m: decisions[m].kept for m in MODALITIES},
            removed={m: decisions[m].removed for m in MODALITIES},
            missed={m: decisions[m].missed for m in MODALITIES},
            notes=notes + on_sinks,
            sinks={m: self.tokens[m].massive() for m in MODALITIES},
            sink_positions={m: self.tokens[m].sinks.where() for m in MODALITIES},
            without_sinks=without_sinks,
            sinks_known=known,
        )

    def leave_group_out(self) -> WithoutGroup | None:
        """For the standard error; None where the tokens are of one group."""
        groups = sorted({group for m in MODALITIES for group in self.tokens[m].groups})
        return WithoutGroup(self, groups) if len(groups) > 1 else None

    def text_norm_sums(self, sinks: bool) -> Tensor:
        """The sums of the norms of all text tokens, by group, (groups,), float64; those of sinks among them or not."""
        store = self.tokens["text"].sinks
        if not sinks or len(store) == 0:
            return self.text_norms
        sums = self.text_norms.clone()
        for group, rows in _by_group(store.rows, store.groups):
            sums[group] += sum_of_norms(rows)
        return sums

    def pair(
        self,
        decisions: Mapping[str, Decision],
        moments: GroupMoments,
        text_norms: Tensor,
        without: int | None = None,
    ) -> GaussianPair:
        """Each modality's held rows as decided, with what `moments` have seen; those stay as they are.

        text_norms: the sum of the norms of all text tokens, for alpha. without: a group that is left out.
        """
        alpha, count = 1.0, decisions["text"].kept + decisions["text"].removed
        if self.options.normalize:
            alpha = alpha_of(text_norms, count, self.layer)
        vision, text = (self._token_moments(m, decisions[m], moments, without) for m in MODALITIES)
        return GaussianPair(self.layer, vision, text, alpha, roundings_of_norms(count, self.hidden_size, streamed=True))

    def merge(self, other: LayerAccumulator) -> None:
        """Take over another accumulator of the same layer."""
        self.text_norms = self.text_norms + other.text_norms
        for modality in MODALITIES:
            self.tokens[modality].merge(other.tokens[modality])
        for slot in other.moments.slots():
            self.moments.merge(slot, other.moments.on_device(slot))
            self._finish_older(slot)

    def to(self, device: torch.device) -> None:
        """Move rows and accumulators. Where that fails, nothing has changed."""
        moved = LayerAccumulator(self.layer, self.hidden_size, self.dtype, device, self.options, host=self._host)
        moved.load_state_dict(self.state_dict())
        vars(self).update(vars(moved))

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors: `text_norms` (groups,), the keys of ModalityTokens after `vision.` and `text.`, and those of
        each accumulator there is after `vision.moments.<group>.` and `text.moments.<group>.`.
        """
        state = {"text_norms": self.text_norms}
        for modality in MODALITIES:
            state |= {f"{modality}.{key}": value for key, value in self.tokens[modality].state_dict().items()}
        for slot in self.moments.slots():
            state |= {f"{prefix_of(slot)}{key}": value for key, value in self.moments.state(slot).items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave; goes on with the same bits.

        ValueError or TypeError that names the entry where something does not fit: half of it may then be taken over.
        """
        self._check_state(state)
        self.moments = self.accumulators(self.options.precision, self._host)
        self.text_norms = state["text_norms"].to(self.device, copy=True)
        for modality in MODALITIES:
            part = _below(f"{modality}.", state)
            with _named(modality):
                self.tokens[modality].load_state_dict({k: v for k, v in part.items() if not k.startswith("moments.")})
            self.tokens[modality].to(self.device)
        for slot in slots(self.options):
            moments = _below(prefix_of(slot), state)
            if moments:
                with _named(prefix_of(slot)):
                    self.moments.load(slot, moments)
            counted, released = (
                self.moments.on_device(slot).count if moments else 0,
                self.tokens[slot[0]].others.released(slot[1]),
            )
            if counted != released:
                raise ValueError(f"{prefix_of(slot)}count: takes the {released} tokens released so far, got {counted}")
            self._finish_older(slot)

    def accumulator(self, precision: Precision) -> StreamingMoments:
        """A fresh one for any slot."""
        return StreamingMoments(self.hidden_size, device=self.device, precision=precision, backend=self.options.backend)

    def accumulators(self, precision: Precision, host: HostMemory | None) -> GroupMoments:
        """A fresh set, of none yet."""
        return GroupMoments(self.hidden_size, self.device, precision, self.options.backend, host)

    def _turn_to(self, modality: str, groups: Tensor) -> tuple[int, int]:
        """The first and the last group of rows that came; of those before the first no more will come."""
        if len(groups) == 0 or not self._in_blocks:
            return 0, 0
        oldest, newest = int(groups.min()), int(groups.max())
        for group in range(oldest):
            self.moments.put_away((modality, group))
        for group in range(oldest, newest + 1):
            self.moments.take_back((modality, group))
        return oldest, newest

    @property
    def _in_blocks(self) -> bool:
        return self.options.samples is not None and self.options.groups > 0

    def _finish_older(self, slot: Slot) -> None:
        """Put away a group's accumulator that tokens of a later group have come after."""
        if self._in_blocks and slot[1] < max(self.tokens[slot[0]].groups, default=0):
            self.moments.put_away(slot)

    def _check_state(self, state: dict[str, Tensor]) -> None:
        prefixes = tuple(prefix_of(slot) for slot in slots(self.options))
        for name, value in state.items():
            _checks.tensor(name, value)
            modality, _, rest = name.partition(".")
            strange = rest.startswith("moments.") and not name.startswith(prefixes)
            if name != "text_norms" and (modality not in MODALITIES or strange):
                raise ValueError(f"{name}: is no entry of a layer's state")
            # Before anything is made as large as a file says.
            if name.endswith(".second") and value.numel() != entries(self.hidden_size):
                raise ValueError(f"{name}: takes {entries(self.hidden_size)} numbers, got {value.numel()}")
        norms = state.get("text_norms")
        if norms is None or norms.dtype != torch.float64 or norms.shape != self.text_norms.shape:
            got = "nothing" if norms is None else f"{norms.dtype} {tuple(norms.shape)}"
            raise ValueError(f"text_norms: takes torch.float64 {tuple(self.text_norms.shape)}, got {got}")
        if not bool((norms.isfinite() & (norms >= 0)).all()):
            raise ValueError(f"text_norms: takes sums of norms, got {norms.tolist()}")
        for modality in MODALITIES:
            groups = {k: v for k, v in state.items() if k.startswith(f"{modality}.") and k.endswith("groups")}
            for name, value in groups.items():
                if value.dtype != torch.uint8:
                    raise ValueError(f"{name}: takes torch.uint8, got {value.dtype}")
            highest = max((int(v.max()) for v in groups.values() if v.numel()), default=0)
            if highest >= len(norms):
                raise ValueError(f"{modality}: takes groups below {len(norms)}, got {highest}")
        for slot in slots(self.options):
            moments_state = _below(prefix_of(slot), state)
            if moments_state and "second" not in moments_state:
                raise ValueError(f"{prefix_of(slot)}second: is missing")
            for name, value in moments_state.items():
                if value.is_floating_point() and not bool(value.isfinite().all()):
                    raise ValueError(f"{prefix_of(slot)}{name}: takes finite numbers")

    def _without_sinks(self) -> tuple[GaussianPair | None, bool, list[str]]:
        """What the distance would be computed of without any sink, None if there is none; whether that is known; and
        what to say of it.
        """
        stores = {m: self.tokens[m].sinks for m in MODALITIES}
        if not self.options.counts_sinks or not any(map(len, stores.values())):
            return None, True, []
        notes = [
            f"layer {self.layer}, {modality}: {len(store) + store.beyond} tokens are attention sinks, more than are "
            f'held apart ({store.hold}), so the distance without them is not known; sinks="leave out" gives it'
            for modality, store in stores.items()
            if store.beyond
        ]
        text_norms = self.text_norm_sums(False).sum()
        no_alpha = self.options.normalize and text_norms.item() == 0.0
        if notes or no_alpha or any(self.tokens[m].others.count() < 2 for m in MODALITIES):
            return None, False, notes
        decisions = {m: self.tokens[m].decide(sinks=False) for m in MODALITIES}
        if any(decision.kept < 2 for decision in decisions.values()):
            return None, False, []
        notes = [
            f"layer {self.layer}, {modality}: the distance without attention sinks has {_tokens(decision.missed)} on "
            "the wrong side of the outlier limits without them, counted or dropped as the stream passed: a larger "
            'hold, or sinks="leave out" with a second pass, makes this exact'
            for modality, decision in decisions.items()
            if decision.missed
        ]
        return self.pair(decisions, self.moments, text_norms), True, notes

    def _token_moments(
        self, modality: str, decision: Decision, moments: GroupMoments, without: int | None
    ) -> TokenMoments:
        rows = decision.rows.to(self.device)
        parts = [slot for slot in moments.slots() if slot[0] == modality and slot[1] != without]
        if not parts:
            return FeatureMoments(rows)
        # For the standard error held rows need no more digits than the others.
        counted = self.accumulator("exact" if without is None else self.options.precision)
        counted.load_state_dict(moments.state(parts[0]))
        for slot in parts[1:]:
            counted.merge(moments.on_device(slot))
        counted.update(rows)
        # Float64 features are accumulated in float64 in every precision but "fast".
        precision = self.options.precision
        rounded = precision == "fast" or (precision == "auto" and self.dtype != torch.float64)
        return TokenMoments(counted, rounded)


class WithoutGroup:
    """An accumulator's tokens without one group of samples at a time.

    The other groups are merged: taking a group's moments away from the whole would cancel. Limits and alpha are those
    of the others' tokens; of rows that were counted in passing none is taken back.
    """

    def __init__(self, accumulator: LayerAccumulator, groups: list[int]) -> None:
        self.groups, self._all = groups, accumulator
        self._text_norms = accumulator.text_norm_sums(accumulator.options.counts_sinks)
        precision = accumulator.options.precision
        self._settled = accumulator.accumulators(precision, accumulator.moments.another_host())
        for slot in accumulator.moments.slots():
            self._settled.load(slot, accumulator.moments.state(slot))
            self._settled.on_device(slot)._fold_pending()  # once for all that follows
            self._settled.put_away(slot)  # where there is room for all of them, if not here

    def pair(self, group: int) -> GaussianPair | None:
        """Without `group`; None where that leaves less than two tokens of a modality."""
        if any(self._all.tokens[m].count(without=group) < 2 for m in MODALITIES):
            return None
        decisions = {m: self._all.tokens[m].decide(without=group) for m in MODALITIES}
        if any(decision.kept < 2 for decision in decisions.values()):
            return None
        norms = torch.stack([norm for other, norm in enumerate(self._text_norms) if other != group]).sum()
        return self._all.pair(decisions, self._settled, norms, without=group)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Names what a refusal is about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name.rstrip('.')}: {error}") from error


def _tokens(count: int) -> str:
    return f"{count} token{'s' * (count != 1)}"


def _below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _by_group(rows: Tensor, groups: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each group's rows, in the order they came."""
    present = groups.unique().tolist()
    for group in present:
        # By index: indexing with a mask would wait for the device to count it.
        index = (groups == group).nonzero().flatten()
        yield group, rows if len(present) == 1 else rows.index_select(0, sent(index, rows.device))
