"""float32 products in float32, whatever the process has set: no autocast, tf32 or bf16 passes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor  # noqa: F401  torch.library reads the annotations of what is decorated in this module

P = ParamSpec("P")
R = TypeVar("R")


@contextlib.contextmanager
def float32_products() -> Iterator[None]:
    """Around matrix products of torch: each is rounded as its dtype says, and keeps it."""
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
