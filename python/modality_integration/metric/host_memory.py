"""Page-locked host memory that tensors of a GPU are copied into asynchronously."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST, LARGEST = 2**24, 2**30  # bytes of a block; each is twice as large as the previous one
ALIGNED = 64  # bytes; alignment for every dtype


class HostMemory:
    """Page-locked host memory: GPU copies are queued in stream order, without synchronising.

    Tensors are packed into blocks of a power of two, because torch rounds every page-locked allocation up to one: with
    separate allocations, some triangles would take nearly twice their size. A block is freed once none of its tensors
    is in use.

    of: device types it serves. CPU tensors are in host memory already.
    """

    def __init__(self, of: tuple[str, ...] = ("cuda",)) -> None:
        self._of = of
        self._pinned = "cuda" in of and torch.cuda.is_available()
        self._block: Tensor | None = None
        self._used = 0  # bytes of the block
        self._copying: set[torch.device] = set()

    def takes(self, device: torch.device) -> bool:
        """Whether it serves tensors of this device."""
        return device.type in self._of

    @torch.inference_mode(False)  # stored tensors outlive inference mode
    @torch.no_grad()
    def store(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor, valid after `wait`; the tensor itself may be freed immediately."""
        place = self._place(tensor)
        place.copy_(tensor, non_blocking=True)
        if tensor.is_cuda:
            self._copying.add(tensor.device)
        return place

    def wait(self) -> None:
        """Wait until all copies have finished."""
        for device in self._copying:
            torch.cuda.synchronize(device)
        self._copying.clear()

    def another(self) -> HostMemory:
        """Empty host memory for the same devices; temporary tensors stored there leave no holes here."""
        return HostMemory(self._of)

    def _place(self, tensor: Tensor) -> Tensor:
        start = -(-self._used // ALIGNED) * ALIGNED
        if self._block is None or start + tensor.nbytes > len(self._block):
            start, before = 0, 0 if self._block is None else len(self._block)
            size = max(SMALLEST, min(2 * before, LARGEST), 1 << max(tensor.nbytes - 1, 0).bit_length())
            self._block = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned, device="cpu")
        self._used = start + tensor.nbytes
        return self._block[start : self._used].view(tensor.dtype).view(tensor.shape)

    def __reduce__(self) -> tuple[type[HostMemory], tuple[tuple[str, ...]]]:
        return HostMemory, (self._of,)  # a copy starts with its own block
