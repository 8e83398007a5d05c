"""One layer of a stream: accumulates vision and text tokens into means and covariances by group of samples."""

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

# Rows held back while they might still turn out to be outliers. At least one more than the hidden size, so that a
# rank-deficient covariance is never formed: with that few tokens, the root is computed from the features.
HOLD = 2048


class LayerAccumulator:
    """Both modalities of layer `layer` (1..K): `push` rows as they arrive, read `result` at any time.

    Keeps one accumulator per modality and group of samples (a triangle of d^2 / 2 float64 numbers each; one group
    without `options.groups`), created when the first rows are released, and at most `hold` rows per modality.
    limits: the outlier limits of a first pass over the same tokens, by modality.

    host: host memory for the accumulators of finished groups, used if groups are consecutive (`options.samples`) and it
    serves this device. Held rows of such a group that are released later, at most `hold` per group, are stored there.

    Attention sinks are kept separately, at most `hold` rows per modality, so that the distance without them is known
    too. With `options.sinks` "leave out", their rows are not kept.
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
        # By group, excluding attention sinks.
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
        """Whether the accumulators of finished groups move to host memory."""
        return self._in_blocks and self.moments.moves

    @property
    def keeps_all(self) -> bool:
        """Whether the outlier rule is off."""
        return all(self.tokens[m].limits == KEEP_ALL for m in MODALITIES)

    def push(
        self,
        modality: str,
        rows: Tensor,
        norms: Tensor,
        groups: Tensor | None = None,
        marks: SinkMarks | None = None,
    ) -> None:
        """Count rows (n, d) with their norms (n,), float32, CPU.

        groups: the group of each row's sample, (n,), uint8, CPU, below `options.groups`; None means group 0 for all.
        marks: which rows are attention sinks; None if none are.
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
                if oldest <= group < newest:  # a batch that spans groups: keep one of them on the device
                    self.moments.put_away((modality, group))

    def result(self) -> LayerResult:
        """The distance over everything pushed so far; does not change the tokens."""
        (result,) = layer_results([self], self.options)
        return result

    def counted(self) -> CountedTokens:
        """All tokens, with the outlier rule applied to the held rows. ValueError if there are too few."""
        layer = self.layer
        for modality in MODALITIES:
            require_tokens(self.tokens[modality].count(), layer, modality)
        decisions = {m: self.tokens[m].decide() for m in MODALITIES}
        for modality, decision in decisions.items():
            require_tokens(decision.kept, layer, f"{modality} within the outlier limits")
        notes = [
            f"layer {layer}, {modality}: {decision.missed} tokens beyond the final 3-sigma limits had already been "
            "counted because the norms drifted during the stream; a larger hold or a second pass makes this exact"
            for modality, decision in decisions.items()
            if decision.missed
        ]
        notes += [
            f"layer {layer}, {modality}: the second pass saw other tokens than the first pass, whose limits it uses"
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
        """For the standard error; None if all tokens are in one group."""
        groups = sorted({group for m in MODALITIES for group in self.tokens[m].groups})
        return WithoutGroup(self, groups) if len(groups) > 1 else None

    def text_norm_sums(self, sinks: bool) -> Tensor:
        """Sum of text token norms per group, (groups,), float64. sinks: whether to include attention sinks."""
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
        """Combine each modality's kept held rows with the rows counted in `moments`, which do not change.

        text_norms: the sum of the norms of all text tokens, for alpha. without: a group to leave out.
        """
        alpha, count = 1.0, decisions["text"].kept + decisions["text"].removed
        if self.options.normalize:
            alpha = alpha_of(text_norms, count, self.layer)
        vision, text = (self._token_moments(m, decisions[m], moments, without) for m in MODALITIES)
        return GaussianPair(self.layer, vision, text, alpha, roundings_of_norms(count, self.hidden_size, streamed=True))

    def merge(self, other: LayerAccumulator) -> None:
        """Add the tokens of another accumulator of the same layer."""
        self.text_norms = self.text_norms + other.text_norms
        for modality in MODALITIES:
            self.tokens[modality].merge(other.tokens[modality])
        for slot in other.moments.slots():
            self.moments.merge(slot, other.moments.on_device(slot))
            self._finish_older(slot)

    def to(self, device: torch.device) -> None:
        """Move rows and accumulators. If that fails, nothing changes."""
        moved = LayerAccumulator(self.layer, self.hidden_size, self.dtype, device, self.options, host=self._host)
        moved.load_state_dict(self.state_dict())
        vars(self).update(vars(moved))

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors: `text_norms` (groups,), the keys of ModalityTokens under `<modality>.`, and those of each
        existing accumulator under `<modality>.moments.<group>.`.
        """
        state = {"text_norms": self.text_norms}
        for modality in MODALITIES:
            state |= {f"{modality}.{key}": value for key, value in self.tokens[modality].state_dict().items()}
        for slot in self.moments.slots():
            state |= {f"{prefix_of(slot)}{key}": value for key, value in self.moments.state(slot).items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a `state_dict`; continuing from it is bit-identical.

        ValueError or TypeError that names the first invalid entry; the state may then be partly loaded.
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
                raise ValueError(f"{prefix_of(slot)}count: expected {released} released tokens, got {counted}")
            self._finish_older(slot)

    def accumulator(self, precision: Precision) -> StreamingMoments:
        """A new accumulator for any slot."""
        return StreamingMoments(self.hidden_size, device=self.device, precision=precision, backend=self.options.backend)

    def accumulators(self, precision: Precision, host: HostMemory | None) -> GroupMoments:
        """A new, empty set of accumulators."""
        return GroupMoments(self.hidden_size, self.device, precision, self.options.backend, host)

    def _turn_to(self, modality: str, groups: Tensor) -> tuple[int, int]:
        """The first and last group of the new rows, after moving those to the device and earlier groups off it."""
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
        """Move a group's accumulator to host memory if tokens of a later group have arrived."""
        if self._in_blocks and slot[1] < max(self.tokens[slot[0]].groups, default=0):
            self.moments.put_away(slot)

    def _check_state(self, state: dict[str, Tensor]) -> None:
        prefixes = tuple(prefix_of(slot) for slot in slots(self.options))
        for name, value in state.items():
            _checks.tensor(name, value)
            modality, _, rest = name.partition(".")
            strange = rest.startswith("moments.") and not name.startswith(prefixes)
            if name != "text_norms" and (modality not in MODALITIES or strange):
                raise ValueError(f"{name}: is not an entry of a layer's state")
            # Before allocating anything of a size read from a file.
            if name.endswith(".second") and value.numel() != entries(self.hidden_size):
                raise ValueError(f"{name}: expected {entries(self.hidden_size)} numbers, got {value.numel()}")
        norms = state.get("text_norms")
        if norms is None or norms.dtype != torch.float64 or norms.shape != self.text_norms.shape:
            got = "nothing" if norms is None else f"{norms.dtype} {tuple(norms.shape)}"
            raise ValueError(f"text_norms: expected torch.float64 {tuple(self.text_norms.shape)}, got {got}")
        if not bool((norms.isfinite() & (norms >= 0)).all()):
            raise ValueError(f"text_norms: expected finite sums of norms >= 0, got {norms.tolist()}")
        for modality in MODALITIES:
            groups = {k: v for k, v in state.items() if k.startswith(f"{modality}.") and k.endswith("groups")}
            for name, value in groups.items():
                if value.dtype != torch.uint8:
                    raise ValueError(f"{name}: expected torch.uint8, got {value.dtype}")
            highest = max((int(v.max()) for v in groups.values() if v.numel()), default=0)
            if highest >= len(norms):
                raise ValueError(f"{modality}: expected groups below {len(norms)}, got {highest}")
        for slot in slots(self.options):
            moments_state = _below(prefix_of(slot), state)
            if moments_state and "second" not in moments_state:
                raise ValueError(f"{prefix_of(slot)}second: is missing")
            for name, value in moments_state.items():
                if value.is_floating_point() and not bool(value.isfinite().all()):
                    raise ValueError(f"{prefix_of(slot)}{name}: expected finite numbers")

    def _without_sinks(self) -> tuple[GaussianPair | None, bool, list[str]]:
        """The inputs of the distance without sinks (None if there are none), whether they are known, and notes."""
        stores = {m: self.tokens[m].sinks for m in MODALITIES}
        if not self.options.counts_sinks or not any(map(len, stores.values())):
            return None, True, []
        notes = [
            f"layer {self.layer}, {modality}: {len(store) + store.beyond} tokens are attention sinks, more than the "
            f'{store.hold} kept, so the distance without them is unknown; use sinks="leave out" to compute it'
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
            "the wrong side of the outlier limits without them, counted or dropped during the stream; a larger hold, "
            'or sinks="leave out" with a second pass, makes this exact'
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
        # For the standard error, held rows need no more digits than the others.
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
    """An accumulator's tokens, leaving out one group of samples at a time.

    The other groups are merged, because subtracting a group's moments from the total would cancel digits. Outlier
    limits and alpha are recomputed from the remaining tokens; rows that were already released stay counted.
    """

    def __init__(self, accumulator: LayerAccumulator, groups: list[int]) -> None:
        self.groups, self._all = groups, accumulator
        self._text_norms = accumulator.text_norm_sums(accumulator.options.counts_sinks)
        precision = accumulator.options.precision
        self._settled = accumulator.accumulators(precision, accumulator.moments.another_host())
        for slot in accumulator.moments.slots():
            self._settled.load(slot, accumulator.moments.state(slot))
            self._settled.on_device(slot)._fold_pending()  # once, not in every merge
            self._settled.put_away(slot)  # the device may not have room for all

    def pair(self, group: int) -> GaussianPair | None:
        """Without `group`; None if that leaves fewer than two tokens of a modality."""
        if any(self._all.tokens[m].count(without=group) < 2 for m in MODALITIES):
            return None
        decisions = {m: self._all.tokens[m].decide(without=group) for m in MODALITIES}
        if any(decision.kept < 2 for decision in decisions.values()):
            return None
        norms = torch.stack([norm for other, norm in enumerate(self._text_norms) if other != group]).sum()
        return self._all.pair(decisions, self._settled, norms, without=group)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Prefix errors raised inside with `name`."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name.rstrip('.')}: {error}") from error


def _tokens(count: int) -> str:
    return f"{count} token{'s' * (count != 1)}"


def _below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _by_group(rows: Tensor, groups: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each group with its rows, in order of arrival."""
    present = groups.unique().tolist()
    for group in present:
        # By index: indexing with a mask would synchronise with the device.
        index = (groups == group).nonzero().flatten()
        yield group, rows if len(present) == 1 else rows.index_select(0, sent(index, rows.device))
