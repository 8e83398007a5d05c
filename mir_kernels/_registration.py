"""How an operation becomes an operator of torch's, `torch.ops.mir_kernels.<name>`: one way for all of them.

Eager code calls the functions behind the operators directly, since a call through torch's dispatcher costs microseconds
and the first one may load the compiler. torch.compile, torch.export and tensor subclasses take the operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.autograd.function import once_differentiable

NAMESPACE = "mir_kernels"


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Define `torch.ops.mir_kernels.<name>` with one implementation for all devices.

    schema: "name(Tensor x, ...) -> ..."; no result may share memory with an argument. fake: shapes and dtypes of the
    results. backward, setup_context: as torch.library.register_autograd takes them; without, backward raises.
    """
    name, _, signature = schema.partition("(")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, f"({signature}", tags=(torch.Tag.pt2_compliant_tag,))  # opcheck passes, in tests
    torch.library.impl(qualified, "default", implementation)
    torch.library.register_fake(qualified, fake)

    def refuse(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(f"{name}: has no derivative; operations of mir_kernels are differentiable once at most")

    torch.library.register_autograd(qualified, backward or refuse, setup_context=setup_context)


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
