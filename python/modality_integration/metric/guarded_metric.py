"""A torchmetrics.Metric whose state is not a set of registered tensors, with guarantees after exceptions."""

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
    """Guarantees that torchmetrics expects of a metric but does not provide itself.

    - After an exception in `compute`, `sync`, a sync context or a rejected `update`, the metric is as before: unsynced,
      with this process's own tokens. If `compute` synced the processes and failed on one, it fails on all.
    - While synced, the state is that of all processes: changes, which `unsync` would lose, raise an error.
    - `compute` always reflects the current tokens, even after a manual sync.
    - `.to()` and similar calls leave results unchanged.

    STATE: names of the state attributes. `_sync_dist` replaces them and must not modify the old ones.
    """

    STATE: ClassVar[tuple[str, ...]] = ()

    _in_state_dict: bool | None = None  # the argument of `persistent`, if it was called

    def persistent(self, mode: bool = False) -> None:
        """Set whether `state_dict` includes the state, both the metric's own and that of a model containing it.

        By default only the metric's own does, so that a model's checkpoints load with or without the metric.
        """
        self._in_state_dict = mode

    def belongs_into(self, prefix: str) -> bool:
        """Whether a `state_dict` with this prefix includes the state; "" is the metric's own."""
        return prefix == "" if self._in_state_dict is None else self._in_state_dict

    def require_unsynced(self, what: str) -> None:
        """Raise a TorchMetricsUserError that names the call if the metric is synced."""
        if self._is_synced:
            raise TorchMetricsUserError(
                f"{what}: the metric is synced and holds the tokens of all processes; call unsync() first"
            )

    def own(self, name: str) -> Any:
        """A state attribute for this process's tokens alone, even while synced."""
        return getattr(self, name) if self._cache is None else self._cache[name]

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Like `torchmetrics.Metric.sync`, but a failure changes nothing."""
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
        """Like `torchmetrics.Metric.sync_context`, but an exception also unsyncs the metric."""
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
        """Plot a result of `compute` or `forward` as a point, or a list of them as a curve; default `compute()`.

        ax: matplotlib axes to draw into. Returns figure and axes; the figure is None if `ax` is given. For the distance
        of each layer use `MIRResult.plot`.
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
            except (TypeError, ValueError):  # nothing has changed, but torchmetrics has counted the call
                self._update_count, self._computed = before
                raise

        return refusable

    def _wrap_compute(self, compute: Callable) -> Callable:
        cached = super()._wrap_compute(self._on_all_or_none(compute))

        @functools.wraps(compute)
        def of_this_state(*args: Any, **kwargs: Any) -> Any:
            by_hand = self._is_synced and not self._to_sync
            if by_hand:
                self._computed = None  # cached for this process's tokens
            value = cached(*args, **kwargs)
            if by_hand:
                self._computed = None  # of all processes' tokens; torchmetrics has unsynced since
            return value

        return of_this_state

    def _on_all_or_none(self, compute: Callable) -> Callable:
        """Make `compute` fail on all processes if it fails on one.

        Otherwise a failed process would sync again while the others, which have a result, would not take part.
        """

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
                    "each keeps its own tokens"
                )
            return value

        return together

    def _where_failed(self, here: bool) -> list[int]:
        """The ranks that failed, gathered on every process."""
        device = transport_device(self.process_group)
        failed = torch.tensor([int(here)], dtype=torch.int64, device=device)
        gather = self.dist_sync_fn or gather_all_tensors
        return [rank for rank, flag in enumerate(gather(failed, group=self.process_group)) if bool(flag.any())]

    def _copy_state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.STATE}

    def _restore(self) -> None:
        """Restore the state from before a sync."""
        for name, value in (self._cache or {}).items():
            setattr(self, name, value)
        self._cache = None

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = "") -> torch.nn.Module:
        results: Any = self._computed, self._forward_cache
        self._computed = self._forward_cache = None  # torchmetrics would convert them to plain tensors
        try:
            return super()._apply(fn, exclude_state)
        finally:
            self._computed, self._forward_cache = results
