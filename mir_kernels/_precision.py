"""Precision of the arithmetic: the dtype of accumulators, and full float32 products whatever the process has set."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from mir_kernels._matmul_switch import full_float32

P = ParamSpec("P")
R = TypeVar("R")


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype of an operation's arithmetic and sums, including column sums: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@contextlib.contextmanager
def float32_products(device: torch.device, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """A context for torch's matrix products on `device` without autocast and without tf32 or bf16 passes.

    dtype: of the products. float64 products have no reduced precision, so torch.float64 changes no setting.
    """
    if dtype == torch.float64:
        yield
        return
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(full_float32(device))
        yield


def with_float32_products(function: Callable[P, R]) -> Callable[P, R]:
    """Run the function in `float32_products` on the device of its first tensor argument."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with float32_products(device):
            return function(*args, **kwargs)

    return run
