"""A layer's accumulators by modality and group of samples; those of finished groups are kept in host memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from mir_kernels import StreamingMoments
from mir_kernels.ops.moments.state import number
from mir_kernels.ops.moments.streaming import ROWS
from modality_integration.metric import MODALITIES
from modality_integration.metric.host_memory import HostMemory
from modality_integration.metric.options import Backend, MetricOptions

Slot = tuple[str, int]  # a modality and a group of samples


def slots(options: MetricOptions) -> list[Slot]:
    """Every accumulator that a layer may have."""
    return list(product(MODALITIES, range(max(options.groups, 1))))


def prefix_of(slot: Slot) -> str:
    """The prefix of an accumulator's keys in a layer's state."""
    return f"{slot[0]}.moments.{slot[1]}."


@dataclass
class _Away:
    """An accumulator in host memory: its state (None before it has seen rows) and the chunks of rows received since."""

    state: dict[str, Tensor] | None
    late: list[Tensor] = field(default_factory=list)


class GroupMoments:
    """Accumulators by slot, each created when its first rows arrive.

    `put_away` moves one to host memory without synchronising. Rows that arrive for it later are stored next to it
    uncounted, until it is next on the device. Every accumulator sees the same updates in the same order, so moving does
    not change a single bit.

    host: the host memory to use; with None, or one that does not serve this device, accumulators stay on the device.
    """

    def __init__(
        self, hidden_size: int, device: torch.device, precision: Any, backend: Backend | None, host: HostMemory | None
    ) -> None:
        self._make = partial(StreamingMoments, hidden_size, device=device, precision=precision, backend=backend)
        self._device = device
        self._host = host if host is not None and host.takes(device) else None
        self._here: dict[Slot, StreamingMoments] = {}
        self._away: dict[Slot, _Away] = {}

    @property
    def moves(self) -> bool:
        """Whether `put_away` moves anything."""
        return self._host is not None

    @property
    def here(self) -> list[StreamingMoments]:
        """The accumulators on the device."""
        return list(self._here.values())

    @property
    def away_bytes(self) -> int:
        """Bytes held in host memory."""
        parts = [away.late + list((away.state or {}).values()) for away in self._away.values()]
        return sum(tensor.nbytes for tensors in parts for tensor in tensors)

    def another_host(self) -> HostMemory | None:
        """Empty host memory for temporary accumulators if any were put away; else None."""
        return self._host.another() if self._host is not None and self._away else None

    def __contains__(self, slot: Slot) -> bool:
        away = self._away.get(slot)
        return slot in self._here or (away is not None and (away.state is not None or bool(away.late)))

    def __len__(self) -> int:
        return len(self.slots())

    def slots(self) -> list[Slot]:
        """Slots that have seen rows, sorted."""
        return sorted(slot for slot in {*self._here, *self._away} if slot in self)

    def update(self, slot: Slot, rows: Tensor) -> None:
        """Count rows (n, d)."""
        if slot in self._away:
            self._away[slot].late.append(self._memory.store(rows))
        else:
            self._made(slot).update(rows)

    def merge(self, slot: Slot, other: StreamingMoments) -> None:
        """Count the rows of another accumulator."""
        if slot in self._away:
            moments = self.on_device(slot)
            moments.merge(other)
            self._replace(self._away[slot], moments)
        else:
            self._made(slot).merge(other)

    def put_away(self, slot: Slot) -> None:
        """Move an accumulator to host memory, if available for this device; few further rows should follow."""
        if self.moves and slot not in self._away:
            moments = self._here.pop(slot, None)
            self._away[slot] = _Away(None if moments is None else self._stored(moments))

    def take_back(self, slot: Slot) -> None:
        """Move an accumulator back to the device if it was put away."""
        if slot in self._away:
            moments = self.on_device(slot) if slot in self else None
            del self._away[slot]
            if moments is not None:
                self._here[slot] = moments

    def on_device(self, slot: Slot) -> StreamingMoments:
        """A non-empty accumulator on the device: itself, or a copy from host memory. Read-only."""
        if slot in self._here:
            return self._here[slot]
        away = self._away[slot]
        self._memory.wait()
        moments = self._make()
        if away.state is not None:
            moments.load_state_dict(away.state)
        for rows in away.late:
            moments.update(rows.to(self._device))
        return moments

    def state(self, slot: Slot) -> dict[str, Tensor]:
        """The `state_dict` of a non-empty accumulator, with tensors in their current memory."""
        if slot in self._here:
            return self._here[slot]._live_state()
        away = self._away[slot]
        self._memory.wait()
        waiting = [] if away.state is None else [away.state["pending"]]
        rows = [part for part in (*waiting, *away.late) if len(part)]
        if away.late and (away.state is None or sum(map(len, rows)) >= ROWS.get(self._device.type, ROWS["cuda"])):
            self._replace(away, self.on_device(slot))  # a full block, which the device folds in
            self._memory.wait()
        if away.state is None or not away.late:
            return dict(away.state or {})
        pending = torch.cat(rows)
        return {**away.state, "pending": pending, "bound": number(len(pending))}

    def load(self, slot: Slot, state: dict[str, Tensor]) -> None:
        """Restore the result of `state` on the device. ValueError or TypeError if it does not fit."""
        self._away.pop(slot, None)
        self._made(slot).load_state_dict(state)

    @property
    def _memory(self) -> HostMemory:
        assert self._host is not None  # otherwise nothing is put away
        return self._host

    def _made(self, slot: Slot) -> StreamingMoments:
        if slot not in self._here:
            self._here[slot] = self._make()
        return self._here[slot]

    def _stored(self, moments: StreamingMoments) -> dict[str, Tensor]:
        return {name: self._memory.store(value) for name, value in moments._live_state().items()}

    def _replace(self, away: _Away, moments: StreamingMoments) -> None:
        """Overwrite a stored state in place where shapes allow: holes would keep blocks from being freed."""
        if away.state is None:
            away.state = self._stored(moments)
        else:
            for name, value in moments._live_state().items():
                if value.shape == away.state[name].shape and value.dtype == away.state[name].dtype:
                    away.state[name].copy_(value)
                else:
                    away.state[name] = self._memory.store(value)
        away.late = []

    def __getstate__(self) -> dict[str, Any]:
        """For copies: clone each tensor, so that the block around it is not copied."""
        if self._host is not None:
            self._host.wait()
        away = {
            slot: _Away(
                None if one.state is None else {name: value.clone() for name, value in one.state.items()},
                [rows.clone() for rows in one.late],
            )
            for slot, one in self._away.items()
        }
        return {**vars(self), "_away": away}
