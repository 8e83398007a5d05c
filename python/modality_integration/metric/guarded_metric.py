"""torchmetrics.Metric for a state that is no set of registered tensors, and that no exception leaves half-way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from modality_integration.metric.result import MIRResult
from modality_integration.metric.sync import transport_device
from modality_integration.metric.tensor_result import as_tensor


class GuardedMetric(Metric):
    """What torchmetrics promises of a metric and does not see to itself.

    - After an exception in `compute`, `sync`, a sync context or a refused `update`, the metric is as before: not
      synced, with this process's own tokens. Where `compute` put processes together and failed on one, it fails on all.
    - While synced, its state is everybody's: what would change that, and be lost with `unsync`, is refused.
    - `compute` gives what was computed of the tokens it has now, also where it was synced by hand.
    - `.to()` and its like leave results alone.

    STATE: names of the attributes that are the state. `_sync_dist` puts others in their place and changes none.
    """

    STATE: ClassVar[tuple[str, ...]] = ()

    _in_state_dict: bool | None = None  # what `persistent` was told, if anything

    def persistent(self, mode: bool = False) -> None:
        """Whether the state goes into `state_dict`, of the metric itself and of a model that it is a part of.

        Before it is said, it goes into the metric's own and not into a model's, whose checkpoints then load as those of
        the model without the metric.
        """
        self._in_state_dict = mode

    def belongs_into(self, prefix: str) -> bool:
        """Whether a `state_dict` with this prefix has the state; "" is the metric's own."""
        return prefix == "" if self._in_state_dict is None else self._in_state_dict

    def require_unsynced(self, what: str) -> None:
        """TorchMetricsUserError that names the call, where the state is not this process's own."""
        if self._is_synced:
            raise TorchMetricsUserError(
                f"{what}: the metric is synced and has the tokens of all processes; call unsync() first"
            )

    def own(self, name: str) -> Any:
        """An attribute of the state as it is for this process's tokens alone, also while synced."""
        return getattr(self, name) if self._cache is None else self._cache[name]

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As torchmetrics' own. Where it fails, nothing has changed."""
        try:
            super().sync(*args, **kwargs)
        except BaseException:
            if not self._is_synced:
                self._restore()
            raise

    @contextmanager
    def sync_context(
        self,
        dist_sync_fn: Callable | None = None,
        process_group: Any = None,
        should_sync: bool = True,
        should_unsync: bool = True,
        distributed_available: Callable | None = None,
    ) -> Iterator[None]:
        """As torchmetrics' own, and left by an exception the metric is not synced either."""
        self.sync(
            dist_sync_fn=dist_sync_fn,
            process_group=process_group,
            should_sync=should_sync,
            distributed_available=distributed_available,
        )
        try:
            yield
        except BaseException:
            self.unsync(should_unsync=self._is_synced)
            raise
        self.unsync(should_unsync=self._is_synced and should_unsync)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """A result of `compute` or `forward` as a point, several in a list as a curve; `compute()` if none is given.

        ax: matplotlib's axes to draw into. Gives figure and axes; the figure is None with `ax`. Each layer's distance
        is drawn by `MIRResult.plot`.
        """
        if isinstance(val, MIRResult):
            val = as_tensor(val)
        elif isinstance(val, Sequence):
            val = [as_tensor(one) if isinstance(one, MIRResult) else one for one in val]
        return self._plot(val, ax)

    def _wrap_update(self, update: Callable) -> Callable:
        counted = super()._wrap_update(update)

        @functools.wraps(update)
        def refusable(*args: Any, **kwargs: Any) -> None:
            self.require_unsynced("update()")
            before = self._update_count, self._computed
            try:
                counted(*args, **kwargs)
            except (TypeError, ValueError):  # refused before anything changed, but torchmetrics has counted the call
                self._update_count, self._computed = before
                raise

        return refusable

    def _wrap_compute(self, compute: Callable) -> Callable:
        cached = super()._wrap_compute(self._on_all_or_none(compute))

        @functools.wraps(compute)
        def of_this_state(*args: Any, **kwargs: Any) -> Any:
            by_hand = self._is_synced and not self._to_sync
            if by_hand:
                self._computed = None  # of this process's tokens
            value = cached(*args, **kwargs)
            if by_hand:
                self._computed = None  # of all processes' tokens, which torchmetrics has let go of
            return value

        return of_this_state

    def _on_all_or_none(self, compute: Callable) -> Callable:
        """Else a process that failed would have to sync again, and the others, with a result, would not take part."""

        @functools.wraps(compute)
        def together(*args: Any, **kwargs: Any) -> Any:
            if not (self._is_synced and self._to_sync):
                return compute(*args, **kwargs)
            try:
                value = compute(*args, **kwargs)
            except BaseException:
                self._where_failed(True)
                raise
            if where := self._where_failed(False):
                raise RuntimeError(
                    f"compute: failed on {', '.join(f'process {rank}' for rank in where)}, so no process has a result; "
                    "each has its own tokens, as before"
                )
            return value

        return together

    def _where_failed(self, here: bool) -> list[int]:
        """The processes that failed, told to all of them."""
        device = transport_device(self.process_group)
        failed = torch.tensor([int(here)], dtype=torch.int64, device=device)
        gather = self.dist_sync_fn or gather_all_tensors
        return [rank for rank, flag in enumerate(gather(failed, group=self.process_group)) if bool(flag.any())]

    def _copy_state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.STATE}

    def _restore(self) -> None:
        """The state from before a sync."""
        for name, value in (self._cache or {}).items():
            setattr(self, name, value)
        self._cache = None

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = "") -> torch.nn.Module:
        results: Any = self._computed, self._forward_cache
        self._computed = self._forward_cache = None  # torchmetrics would move them, and what is moved is no result
        try:
            return super()._apply(fn, exclude_state)
        finally:
            self._computed, self._forward_cache = results
