"""Calls of moca and add_moca_rms_norm on the tensors of the fixture `t`, and a subclass that counts operator calls."""

from typing import ClassVar

import torch

from mir_kernels.ops.moca import add_moca_rms_norm, moca

D = 16


def vectors(t):
    return t["scale"], t["shift"], t["mask"]


FORWARD = {
    "moca": lambda t: (moca(t["x"], *vectors(t)),),
    "add_moca_rms_norm": lambda t: add_moca_rms_norm(t["x"], t["residual"], *vectors(t), t["weight"]),
}


class Wrapped(torch.Tensor):
    """A tensor without its own memory, like DTensor, that counts calls of registered operators."""

    seen: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        Wrapped.seen.append(function._schema.name)
        return function(*(a.inner if isinstance(a, Wrapped) else a for a in args), **(kwargs or {}))
