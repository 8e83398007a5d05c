"""Guarded memory for kernel tests: it reveals writes outside of a tensor, and elements that were never written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

GUARD = 256  # elements before and after, a multiple of 16 bytes in every dtype
BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Guards:
    """Tensors inside larger buffers of a guard value: NaN, which also reveals reads; True for masks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._empty = torch.empty

    def around(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy with guards."""
        return self.poisoned(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)

    def poisoned(self, shape: tuple, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
        """Unwritten memory: guards, and the guard value inside."""
        value = float("nan") if dtype.is_floating_point else 1
        buffer = self._empty(2 * GUARD + torch.Size(shape).numel(), dtype=dtype, device=device).fill_(value)
        view = buffer[GUARD : buffer.numel() - GUARD].view(shape)
        bits = buffer.view(BYTES[buffer.element_size()])
        self._buffers.append((bits, bits.clone()))
        return view

    @contextlib.contextmanager
    def on_every_allocation(self) -> Iterator[None]:
        """Make all uninitialised allocations of a launcher guarded and poisoned."""

        def empty(*shape, dtype=None, device=None, **_):
            size = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
            return self.poisoned(tuple(size), dtype or torch.float32, device or "cpu")

        def like(x, dtype=None, **_):
            return self.poisoned(x.shape, dtype or x.dtype, x.device)

        def new(x, *shape, dtype=None, **_):
            return empty(*shape, dtype=dtype or x.dtype, device=x.device)

        with self._patch.context() as patch:
            patch.setattr(torch, "empty", empty)
            patch.setattr(torch, "empty_like", like)
            patch.setattr(torch.Tensor, "new_empty", new)
            yield

    def assert_whole(self) -> None:
        """Assert that no bit of any guard has changed."""
        assert self._buffers
        for now, before in self._buffers:
            assert torch.equal(now[:GUARD], before[:GUARD]), "written before a buffer"
            assert torch.equal(now[-GUARD:], before[-GUARD:]), "written after a buffer"


@pytest.fixture
def default_settings() -> Iterator[None]:
    """torch's default settings for float32 products before and after, and no users left afterwards."""
    from kernels.matmul_settings import start
    from mir_kernels import _matmul_switch

    start()
    yield
    start()
    assert not any(switch.users for switch in _matmul_switch.SWITCHES.values())


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> Guards:
    return Guards(monkeypatch)
