"""Registers operations with torch as `torch.ops.mir_kernels.<name>`, in one way for all of them.

Eager code calls the functions behind the operators directly: a call through torch's dispatcher costs microseconds, and
the first one may load the compiler. torch.compile, torch.export and tensor subclasses use the operators.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch.autograd.function import once_differentiable

NAMESPACE = "mir_kernels"


@dataclass(frozen=True)
class Sharding:
    """How the DTensors of an operator may be placed: replicated, or sharded along one of their common leading axes.

    inputs, outputs: one letter per argument and result. "x": has the leading axes and is sharded; "w": is replicated;
    "+": is a partial sum over the rows of each rank; "-": is not a tensor. last: the number of trailing axes of the
    first "x" that are not leading: 1 for tokens, 2 for matrices.
    """

    inputs: str
    outputs: str
    last: int


_shardings: dict[str, Sharding] = {}  # of operators not yet registered with DTensor


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    sharding: Sharding,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Define `torch.ops.mir_kernels.<name>` with one implementation for all devices.

    schema: "name(Tensor x, ...) -> ..."; no result may share memory with an argument. fake: computes the shapes and
    dtypes of the results. sharding: of DTensors. backward, setup_context: as in torch.library.register_autograd;
    without them, a backward pass raises an error.
    """
    name, _, signature = schema.partition("(")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, f"({signature}", tags=(torch.Tag.pt2_compliant_tag,))  # opcheck passes, in tests
    torch.library.impl(qualified, "default", implementation)
    torch.library.register_fake(qualified, fake)

    def refuse(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(f"{name}: has no derivative; operations of mir_kernels are differentiable at most once")

    torch.library.register_autograd(qualified, backward or refuse, setup_context=setup_context)
    _shardings[name] = sharding


def shard_operators() -> None:
    """Register the sharding rules with DTensor if it is loaded. Loading it takes longer than everything else here."""
    if not _shardings or "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor.experimental import register_sharding

    for name, sharding in _shardings.items():
        register_sharding(getattr(torch.ops.mir_kernels, name).default)(partial(_placements, sharding))
    _shardings.clear()


shard_operators._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile runs it while tracing


def _placements(sharding: Sharding, *arguments: Any) -> list[tuple[list[Any], list[Any]]]:
    """All placements of results and arguments: replicated, or sharded along one leading axis."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    def place(letters: str, cut: int | None) -> list[Any]:
        whole = {"x": Replicate(), "w": Replicate(), "+": Replicate(), "-": None}
        placed = whole if cut is None else {**whole, "x": Shard(cut), "+": Partial()}
        return [placed[letter] for letter in letters]

    given = "".join(
        "-" if argument is None else letter for letter, argument in zip(sharding.inputs, arguments, strict=True)
    )
    leading = arguments[sharding.inputs.index("x")].ndim - sharding.last
    return [(place(sharding.outputs, cut), place(given, cut)) for cut in (None, *range(leading))]


def eager_function(
    name: str, forward: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """The autograd.Function that eager code calls if a gradient is required: `forward` itself, differentiable once."""
    members = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(once_differentiable(backward)),
    }
    return type(name, (torch.autograd.Function,), members)
