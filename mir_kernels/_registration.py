"""How an operation becomes an operator of torch's, `torch.ops.mir_kernels.<name>`: one way for all of them.

Eager code calls the functions behind the operators directly, since a call through torch's dispatcher costs microseconds
and the first one may load the compiler. torch.compile, torch.export and tensor subclasses take the operators.
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
    """How an operator takes DTensors: whole on every rank, or cut along one of the leading axes that they share.

    inputs, outputs: a letter for each argument and result. "x": has the leading axes, and is cut; "w": is whole on
    every rank; "+": a sum over the rows, of which each rank has its own; "-": no tensor. last: axes of the first "x"
    that are not leading: 1 for tokens, 2 for matrices.
    """

    inputs: str
    outputs: str
    last: int


_shardings: dict[str, Sharding] = {}  # of the operators that DTensor does not know of yet


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

    schema: "name(Tensor x, ...) -> ..."; no result may share memory with an argument. fake: shapes and dtypes of the
    results. sharding: of DTensors. backward, setup_context: as torch.library.register_autograd takes them; without,
    backward raises.
    """
    name, _, signature = schema.partition("(")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, f"({signature}", tags=(torch.Tag.pt2_compliant_tag,))  # opcheck passes, in tests
    torch.library.impl(qualified, "default", implementation)
    torch.library.register_fake(qualified, fake)

    def refuse(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(f"{name}: has no derivative; operations of mir_kernels are differentiable once at most")

    torch.library.register_autograd(qualified, backward or refuse, setup_context=setup_context)
    _shardings[name] = sharding


def shard_operators() -> None:
    """Tell DTensor, once it is loaded, how the operators may be sharded. Loading it takes longer than all of this."""
    if not _shardings or "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor.experimental import register_sharding

    for name, sharding in _shardings.items():
        register_sharding(getattr(torch.ops.mir_kernels, name).default)(partial(_placements, sharding))
    _shardings.clear()


shard_operators._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile runs it while it traces


def _placements(sharding: Sharding, *arguments: Any) -> list[tuple[list[Any], list[Any]]]:
    """Every way to place results and arguments: all whole, or cut along one leading axis."""
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
    """The autograd.Function that eager code calls where a gradient is wanted: `forward` itself, differentiable once."""
    members = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(once_differentiable(backward)),
    }
    return type(name, (torch.autograd.Function,), members)
