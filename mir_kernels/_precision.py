"""What arithmetic is done in: the dtype of accumulators, and float32 products in float32 whatever the process set."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype of an operation's arithmetic and sums, and of its column sums: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@contextlib.contextmanager
def float32_products() -> Iterator[None]:
    """Around matrix products of torch: no autocast, no tf32 or bf16 passes."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # before torch 2.9
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(before)
            return
        switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
        found = [switch.fp32_precision for switch in switches]
        for switch in switches:
            switch.fp32_precision = "ieee"
        try:
            yield
        finally:
            for switch, precision in zip(switches, found, strict=True):
                switch.fp32_precision = precision


def with_float32_products(function: Callable[P, R]) -> Callable[P, R]:
    """The function, run in `float32_products`."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with float32_products():
            return function(*args, **kwargs)

    return run
