"""Host memory that tensors of a GPU are put into while it works on."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST, LARGEST = 2**24, 2**30  # bytes of a block; each is twice the one before
ALIGNED = 64  # bytes; every dtype may begin there


class HostMemory:
    """Page-locked host memory: a GPU copies tensors into it in the order of its own work, and nobody waits.

    Tensors lie one behind the other in blocks of a power of two, to which torch rounds every page-locked allocation:
    with one for each, some triangles would take nearly twice their size. A block is given back once no tensor in it is
    used any more.

    of: types of devices whose tensors it is for. A CPU's lie in the host's memory already.
    """

    def __init__(self, of: tuple[str, ...] = ("cuda",)) -> None:
        self._of = of
        self._pinned = "cuda" in of and torch.cuda.is_available()
        self._block: Tensor | None = None
        self._used = 0  # bytes of it
        self._copying: set[torch.device] = set()

    def takes(self, device: torch.device) -> bool:
        """Whether it is for tensors of this device."""
        return device.type in self._of

    @torch.inference_mode(False)  # what is stored outlives it
    @torch.no_grad()
    def store(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor; it has its content after `wait`, and the tensor itself may go at once."""
        place = self._place(tensor)
        place.copy_(tensor, non_blocking=True)
        if tensor.is_cuda:
            self._copying.add(tensor.device)
        return place

    def wait(self) -> None:
        """Until everything stored is there."""
        for device in self._copying:
            torch.cuda.synchronize(device)
        self._copying.clear()

    def another(self) -> HostMemory:
        """An empty one for the same devices: what is stored there for a while leaves no holes here."""
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
        return HostMemory, (self._of,)  # a copy begins with a block of its own
