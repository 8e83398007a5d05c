"""StreamingMoments: count, mean and covariance of tokens in one pass, mergeable in any order."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from mir_kernels import _checks
from mir_kernels._gate import outside_compilation, with_memory
from mir_kernels.ops.moments import packed
from mir_kernels.ops.moments.centre import block_centre
from mir_kernels.ops.moments.finite import require_finite
from mir_kernels.ops.moments.launch import STREAMING_MOMENTS, Backend, block_update
from mir_kernels.ops.moments.locking import Locked, alone, both
from mir_kernels.ops.moments.state import OWN, REDUCED, VERSION, check, number

if TYPE_CHECKING:
    from mir_kernels._arrays import Array

Precision = Literal["fast", "auto", "exact"]
PRECISIONS = get_args(Precision)

# Rows gathered before a product, by device type. More rows would not make the product faster per row.
ROWS = {"cpu": 1024, "cuda": 4096}
# Rows per block of a large GPU update that needs no gathering. Each block costs a pass over the triangle, but with more
# rows, float32 sums of products with a mean of 4 deviations would exceed the guaranteed error.
DIRECT = 8192


class StreamingMoments(Locked):
    """Mean and covariance of tokens in one pass: mu = sum x_t / n, C = sum (x_t - mu)(x_t - mu)^T / (n - ddof).

    Blocks of rows are shifted by a vector near their mean, multiplied, and combined by the rule of Chan, Golub and
    LeVeque (Updating formulae and a pairwise algorithm for computing sample variances, 1979), which is algebraically
    exact for any split and order. Small updates are gathered until a product is worthwhile; reading a property folds
    them in.

    hidden_size: d. device: of the tokens and the state.
    precision: "auto": the error of every covariance entry is at most 1e-5 sigma_i sigma_j for any mean, with products
    in float32 or split bfloat16 (float64 for float64 tokens), for deviations between 1e-15 and 4e16; beyond these, a
    block's sums of squares exceed the range of float32. "exact": products in float64. "fast": one low-precision pass
    with Triton, whose error grows with the square of mean / deviation; the same as "auto" on other backends.
    backend: "triton", "native" or "eager" (`mir_kernels.backends()`), or "reference".

    Threads may share an instance; each call has exclusive access. With as many threads as cores, one instance per
    thread and a `merge` at the end is faster, because no call waits for another.

    An update that raises leaves the state unchanged. Updates do not check that tokens are finite, which would wait for
    the device; reading a mean or covariance that is not finite raises ValueError.
    """

    _reduced: frozenset[int] = frozenset()  # identifiers of the sums over ranks that are included

    def __init__(
        self,
        hidden_size: int,
        *,
        device: torch.device | str | None = None,
        precision: Precision = "auto",
        backend: Backend | None = None,
    ) -> None:
        if not isinstance(hidden_size, int) or isinstance(hidden_size, bool) or hidden_size < 1:
            raise ValueError(f"hidden_size: expected an integer of at least 1, got {hidden_size!r}")
        _checks.choice("precision", precision, PRECISIONS)
        super().__init__()
        self.hidden_size, self.precision = hidden_size, precision
        self.device = torch.empty(0, dtype=torch.float32, device=device).device
        self._asked = backend
        self.backend = STREAMING_MOMENTS.choose(backend, self.device)
        self.reset()

    @torch.inference_mode(False)
    @alone
    def reset(self) -> None:
        """Remove all rows, including the record of those that other ranks hold as well."""
        d = self.hidden_size
        self._reduced = frozenset()
        zeros = partial(torch.zeros, dtype=torch.float64, device=self.device)
        self._count = torch.zeros((), dtype=torch.int64, device=self.device)  # rows folded in
        self._mean = zeros(d)
        # The centred second moment is _second + sum_r _weights[r] _owed[r] _owed[r]^T: the two outer products of Chan's
        # rule are deferred to the next block, which passes over the triangle anyway.
        self._second = zeros(packed.entries(d))
        self._owed = zeros(2, d)
        self._weights = zeros(2)
        self._pending: Tensor | None = None  # (rows + 1, d), the tokens' dtype; rows dropped by a mask go to the last
        self._bound = 0  # upper bound on the rows of _pending in use: on CUDA only the device knows what a mask kept
        self._filled = torch.zeros((), dtype=torch.int64, device=self.device)  # the exact number
        self._whole = True  # no mask dropped any row, so _bound is exact

    @outside_compilation
    @alone
    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, x: Array, mask: Array | None = None) -> None:
        """Add the tokens x `(..., d)`, f32/bf16/f16/f64, any strides, where mask `(...)`, bool or uint8, is nonzero.

        Both may be NumPy arrays. On CUDA nothing waits for the device, unless the mask has another integer dtype, whose
        entries are checked to be 0 and 1.
        """
        x = _checks.tokens("x", x)
        if x.shape[-1] != self.hidden_size:
            raise ValueError(f"x: expected shape (..., {self.hidden_size}), got {tuple(x.shape)}")
        if x.device != self.device:
            raise ValueError(f"x: is on {x.device}, but the moments are on {self.device}")
        if mask is not None:
            mask = _checks.mask("mask", mask, tuple(x.shape[:-1]))
            _checks.same_device("mask", mask, "x", x)
            mask = with_memory("StreamingMoments.update", "mask", mask)
        rows = with_memory("StreamingMoments.update", "x", x).detach().reshape(-1, self.hidden_size)
        keep = None if mask is None else mask.reshape(-1) != 0
        if rows.shape[0] == 0:
            return
        if self._pending is not None and self._pending.dtype != rows.dtype:
            self._fold_pending()
            self._pending = None
        if self._waits_for_nothing():
            self._gather_on_device(rows, keep)
        else:
            self._gather_known(rows, keep)

    @property
    @outside_compilation
    @alone
    def count(self) -> int:
        """Rows so far. Waits for the device."""
        return int(self._count + self._filled)

    @property
    @outside_compilation
    @alone
    def mean(self) -> Tensor:
        """mu `(d,)`, float64; zeros if there are no rows. ValueError if it is not finite."""
        self._fold_pending()
        require_finite("mean", self._mean, None, self.precision)
        return self._mean.clone()

    @outside_compilation
    @alone
    @torch.inference_mode(False)
    @torch.no_grad()
    def covariance(self, ddof: int = 1) -> Tensor:
        """C `(d, d)`, float64, symmetric. ValueError if count <= ddof or C is not finite."""
        self._settle()
        count = self.count
        if count <= ddof:
            raise ValueError(f"count: a covariance with ddof {ddof} requires more than {ddof} rows, got {count}")
        variances = packed.diagonal(self._second, self.hidden_size)
        require_finite("covariance", self._mean, variances, self.precision)
        out = packed.unpack(self._second, self.hidden_size).div_(count - ddof)
        out.diagonal().clamp_(min=0.0)
        return out

    @outside_compilation
    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, other: StreamingMoments) -> None:
        """Add all rows of `other`, which stays unchanged.

        ValueError if both hold the total of the same all_reduce.
        """
        if not isinstance(other, StreamingMoments):
            raise TypeError(f"other: expected a StreamingMoments, got {type(other).__name__}")
        if other is self:
            raise ValueError("other: expected a different StreamingMoments, got the object itself")
        if other.hidden_size != self.hidden_size:
            raise ValueError(f"other: expected hidden_size {self.hidden_size}, got {other.hidden_size}")
        if other.device != self.device:
            raise ValueError(f"other: is on {other.device}, but the moments are on {self.device}; move it with .to()")
        with both(self, other):
            self._add(other)

    @outside_compilation
    @alone
    @torch.inference_mode(False)
    @torch.no_grad()
    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Give every rank of `group` the moments of the rows of all its ranks. Ranks may have no rows.

        Uses two sums over the ranks: counts and sums first, then the second moments around the common mean.
        If two ranks hold the total of the same earlier all_reduce, every rank raises RuntimeError and nothing changes;
        `copy.deepcopy(moments).all_reduce()` returns intermediate totals in a copy. Totals of disjoint groups may be
        reduced again, for example across machines after a reduction within each.
        """
        from torch import distributed

        from mir_kernels.ops.moments.reduction import add_up

        if not (distributed.is_available() and distributed.is_initialized()):
            raise RuntimeError(
                "all_reduce: expected an initialised process group; call torch.distributed.init_process_group"
            )
        if distributed.get_rank(group) < 0:
            distributed.all_reduce(torch.zeros_like(self._mean), group=group)  # does nothing; torch warns
            return
        n = (self._count + self._filled).double()
        rows_sum = self._count.double() * self._mean
        if self._pending is not None and self._bound:
            rows, kept = self._pending[: self._bound], self._kept()
            rows_sum += (rows if kept is None else torch.where(kept[:, None], rows, 0)).sum(0, dtype=torch.float64)
        sums, reduced = add_up(torch.cat([n[None], rows_sum]), self._reduced, group)
        self._settle()
        mean = sums[1:] / sums[0].clamp(min=1)
        packed.add_outer(self._second, self.hidden_size, (self._mean - mean)[None], n[None])
        distributed.all_reduce(self._second, group=group)
        self._mean, self._count, self._reduced = mean, sums[0].to(torch.int64), reduced

    @outside_compilation
    @alone
    @torch.inference_mode(False)
    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the state as plain tensors. Gathered rows are stored unchanged, so a run resumed from it has the
        same bits as an uninterrupted one.

        Entries: version, count, mean, second, owed, weights, pending, bound; after an all_reduce also reduced.
        """
        return {name: value.clone() for name, value in self._live_state().items()}

    def _live_state(self) -> dict[str, Tensor]:
        """`state_dict` without copying, for callers that read or copy it before the moments change."""
        kept = self._bound if self._whole else int(self._filled)  # waits for the device only if _bound is inexact
        own = {name: getattr(self, f"_{name}") for name in OWN}
        if self._pending is None:
            pending = torch.empty(0, self.hidden_size, dtype=torch.float32, device=self.device)
        else:
            pending = self._pending[:kept]
        state = {"version": number(VERSION), **own, "pending": pending, "bound": number(self._bound)}
        if self._reduced:
            state[REDUCED] = torch.tensor(sorted(self._reduced), dtype=torch.int64, device="cpu")
        return state

    @outside_compilation
    @alone
    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load a copy of a `state_dict` from any device. An invalid state raises an error and changes nothing."""
        check(state, self._live_state(), self.hidden_size, max(ROWS.values()))
        pending, bound = state["pending"], int(state["bound"])
        self.reset()
        self._reduced = frozenset(state[REDUCED].tolist()) if REDUCED in state else frozenset()
        for name in OWN:
            setattr(self, f"_{name}", state[name].to(self.device, copy=True))
        if pending.shape[0]:
            # A state from another device may hold more rows than are gathered here. They are then folded in at once.
            rows = pending.to(self.device)
            self._bound = max(rows.shape[0], bound) if self._waits_for_nothing() else rows.shape[0]
            self._allocate(rows.dtype, max(self._rows(), self._bound))[: rows.shape[0]] = rows
            self._filled.fill_(rows.shape[0])
            self._whole = self._bound == rows.shape[0]
            if self._bound >= self._rows():
                self._fold_pending()
                self._pending = None

    @alone
    def to(self, device: torch.device | str) -> StreamingMoments:
        """Move the state, choose the backend again, and return self. If this fails, nothing changes."""
        moved = type(self).__new__(type(self))
        moved.__setstate__(self.__getstate__())
        moved.device = torch.empty(0, dtype=torch.float32, device=device).device
        moved.backend = STREAMING_MOMENTS.choose(self._asked, moved.device)
        moved.load_state_dict(self._live_state())
        vars(self).update(moved.__getstate__())
        return self

    @property
    def memory_bytes(self) -> int:
        """Bytes of all tensors of the state."""
        held = (self._count, self._mean, self._second, self._owed, self._weights, self._filled, self._pending)
        return sum(t.nbytes for t in held if t is not None)

    def __repr__(self) -> str:
        return (
            f"StreamingMoments({self.hidden_size}, device={str(self.device)!r}, precision={self.precision!r}, "
            f"backend={self.backend!r})"
        )

    def _waits_for_nothing(self) -> bool:
        return self.device.type != "cpu" or self.backend == "triton"

    def _rows(self) -> int:
        return ROWS.get(self.device.type, ROWS["cuda"])

    def _allocate(self, dtype: torch.dtype, rows: int) -> Tensor:
        self._pending = torch.empty(rows + 1, self.hidden_size, dtype=dtype, device=self.device)
        return self._pending

    def _kept(self) -> Tensor | None:
        """Which of the gathered rows in use are valid, (_bound,) bool; None if all are."""
        return None if self._whole else torch.arange(self._bound, device=self.device, dtype=torch.int64) < self._filled

    def _gather_known(self, rows: Tensor, keep: Tensor | None) -> None:
        """Fold in blocks of exactly _rows() rows, in order, so the bits do not depend on how updates split the rows."""
        index = None if keep is None else keep.nonzero().flatten()
        total, done, size = rows.shape[0] if index is None else index.shape[0], 0, self._rows()
        while done < total:
            take = min(size - self._bound, total - done)
            part = rows[done : done + take] if index is None else rows.index_select(0, index[done : done + take])
            done += take
            if take == size:
                self._fold(part, None)
                continue
            pending = self._allocate(rows.dtype, size) if self._pending is None else self._pending
            pending[self._bound : self._bound + take] = part
            self._bound += take
            self._filled += take
            if self._bound == size:
                self._fold_pending()

    def _gather_on_device(self, rows: Tensor, keep: Tensor | None) -> None:
        """The same if the host does not know how many rows a mask keeps: the device moves and counts them."""
        size = self._rows()
        if keep is None and rows.shape[0] >= size:
            direct = rows.shape[0] // size * size
            for part in rows[:direct].split(max(size, DIRECT)):
                self._fold(part, None)
            rows = rows[direct:]
        if keep is None and self._whole:
            self._gather_known(rows, None)
            return
        for start in range(0, rows.shape[0], size):
            part = rows[start : start + size]
            take = part.shape[0]
            if self._bound + take > size:
                self._fold_pending()
            pending = self._allocate(rows.dtype, size) if self._pending is None else self._pending
            kept = (
                torch.ones(take, dtype=torch.bool, device=self.device) if keep is None else keep[start : start + size]
            )
            place = torch.where(kept, self._filled + kept.cumsum(0) - 1, size)
            pending.index_copy_(0, place, part)
            self._bound += take
            self._filled += kept.sum()
            self._whole = False

    @torch.inference_mode(False)
    @torch.no_grad()
    def _fold_pending(self) -> None:
        if self._bound and self._pending is not None:
            self._fold(self._pending[: self._bound], self._kept())
            self._bound = 0
            self._filled.zero_()
            self._whole = True

    def _fold(self, x: Tensor, mask: Tensor | None) -> None:
        """Add a block (rows, d) to the state: Chan's rule around the shift s that was subtracted from the block.

        M' = M + n a a^T + sum (x - s)(x - s)^T - n' b b^T with a = mu - s, b = mu' - s, n' = n + rows.
        """
        added = torch.full_like(self._count, x.shape[0]) if mask is None else mask.sum()
        n, total = self._count.double(), (self._count + added).double()
        host = not self._waits_for_nothing()
        centre = block_centre(x, mask, added, self._count, self._mean, host=host)
        shift, sums = block_update(self.backend, self.precision, x.dtype).accumulate(
            self._second, x, mask, centre, self._owed, self._weights, self.precision
        )
        a = self._mean - shift
        b = (n * a + sums) / total.clamp(min=1)
        self._owed, self._weights = torch.stack([a, b]), torch.stack([n, -total])
        self._mean = shift + b
        self._count += added

    def _add(self, other: StreamingMoments) -> None:
        if self._reduced & other._reduced:
            raise ValueError("other: holds the total of an all_reduce that these moments also hold")
        self._reduced |= other._reduced
        n, m = self._count.double(), other._count.double()
        total = (n + m).clamp(min=1)
        delta = other._mean - self._mean
        self._second += other._second
        vectors = torch.cat([self._owed, other._owed, delta[None]])
        weights = torch.cat([self._weights, other._weights, (n * m / total)[None]])
        packed.add_outer(self._second, self.hidden_size, vectors, weights)
        self._owed.zero_()
        self._weights.zero_()
        self._mean += delta * (m / total)
        self._count += other._count
        if other._pending is not None and other._bound:
            self.update(other._pending[: other._bound], other._kept())

    @torch.inference_mode(False)
    @torch.no_grad()
    def _settle(self) -> None:
        """Fold in the gathered rows and add the deferred outer products."""
        self._fold_pending()
        packed.add_outer(self._second, self.hidden_size, self._owed, self._weights)
        self._owed.zero_()
        self._weights.zero_()
