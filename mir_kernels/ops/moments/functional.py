"""The public function: checks, then the registered operator under torch.compile and the raw function elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from mir_kernels import _checks
from mir_kernels._gate import by_operator
from mir_kernels.ops.moments import autograd, launch

if TYPE_CHECKING:
    from mir_kernels._arrays import Array

__all__ = ["token_norms"]


def token_norms(x: Array, *, backend: launch.Backend | None = None) -> Tensor:
    """The l2 norms ||x_t|| of tokens x `(..., d)`, f32/bf16/f16/f64, tensor or NumPy array, as float32 `(...)`.

    Finite f16/bf16/f32 tokens cause no intermediate overflow; a norm beyond the range of float32 is infinite. Any
    strides; not differentiable.
    """
    x = _checks.tokens("x", x)
    name = launch.TOKEN_NORMS.choose(backend, x.device)
    run = autograd.token_norms if by_operator("token_norms", x) else launch.token_norms
    return run(x.detach(), name)
