"""The one gate before every native and Triton call: whether an argument's memory may be read at its address.

Raw calls read and write addresses. A trace does not see that, a subclass may have no memory of its own, and that of a
negative view does not hold the numbers it means. Where any of this is so, the registered operator is called instead
(`by_operator`), which torch's dispatcher gives plain tensors; what has no operator takes what `with_memory` gives.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import TransformType, get_interpreter_stack, is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

from mir_kernels import _registration

P = ParamSpec("P")
R = TypeVar("R")

PLAIN = (Tensor, torch.nn.Parameter)  # other subclasses go through the dispatcher, where they can say what they do


def by_operator(name: str, *tensors: Tensor | None) -> bool:
    """Whether the registered operator is called: someone traces or listens, or an argument is no plain memory.

    Raises:
        RuntimeError: an argument is wrapped by a torch.func transform, or carries a tangent, which would be dropped.
        TypeError: some arguments are DTensors and others are not.
    """
    if torch.compiler.is_compiling():
        _registration.shard_operators()
        return True
    if (forward_ad._current_level >= 0 or _are_functorch_transforms_active()) and _functionalized(name, *tensors):
        return True
    if _len_torch_dispatch_stack() or _get_tracing_state() is not None:
        return True
    for tensor in tensors:
        if not is_memory(tensor):
            _look_for_dtensors(name, *tensors)
            return True
    return False


def is_memory(tensor: Tensor | None) -> bool:
    """Whether there is nothing to read, or it can be read at its address: no subclass, no negative view, no zero
    without memory, no tensor without values."""
    return tensor is None or not (
        type(tensor) not in PLAIN or tensor.is_neg() or tensor._is_zerotensor() or tensor.is_meta
    )


def with_memory(name: str, argument: str, tensor: Tensor) -> Tensor:
    """`tensor` as plain memory with the numbers that it means, for what keeps state or has no operator.

    Raises:
        RuntimeError: in a trace, under a torch.func transform, or of a fake tensor: there are no numbers.
        TypeError: of another subclass that has no plain memory, as a DTensor.
    """
    watched = _len_torch_dispatch_stack() or _are_functorch_transforms_active() or _get_tracing_state() is not None
    if is_memory(tensor) and not watched:
        return tensor
    modes = _python_dispatch._get_current_dispatch_mode_stack()
    fake = _is_fake(tensor) or any(mode.is_infra_mode() for mode in modes)
    if fake or _functionalized(name, tensor) or _get_tracing_state() is not None:
        raise RuntimeError(
            f"{name}: keeps or tells numbers, so it takes tensors that have some, outside fake tensors, traces and "
            "functionalization"
        )
    if type(tensor) not in PLAIN and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__:
        tensor = tensor.as_subclass(Tensor)
    if type(tensor) in PLAIN:
        return tensor.clone() if tensor.is_neg() or tensor._is_zerotensor() else tensor
    found = tensor.detach().clone()  # of a result that a collective still owes: the result
    if type(found) in PLAIN:
        return found
    advice = "; give it .to_local() or .full_tensor()" if type(tensor).__name__ == "DTensor" else ""
    raise TypeError(f"{argument}: takes a plain torch.Tensor, got {type(tensor).__name__}{advice}")


def _is_fake(tensor: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def _functionalized(name: str, *tensors: Tensor | None) -> bool:
    """Whether a tensor is wrapped by torch.func.functionalize, which knows what to do with an operator.

    RuntimeError where one is wrapped by another transform, and has no memory, or has a tangent, which would be dropped.
    """
    dual, wrapped = forward_ad._current_level >= 0, False
    for tensor in tensors:
        if tensor is None:
            continue
        wrapped |= is_functorch_wrapped_tensor(tensor)
        if dual and forward_ad.unpack_dual(tensor).tangent is not None:
            _refuse(name)
    if wrapped and any(one.key() != TransformType.Functionalize for one in get_interpreter_stack() or ()):
        _refuse(name)
    return wrapped


def _refuse(name: str) -> NoReturn:
    raise RuntimeError(
        f"{name}: torch.func transforms (vmap, grad, jvp) and forward-mode derivatives are not supported; autograd is, "
        "where the operation has a gradient, and a batch needs no vmap: arguments may have any number of leading axes"
    )


def _look_for_dtensors(name: str, *tensors: Tensor | None) -> None:
    """DTensors stand beside DTensors alone; once there are some, the operators know how they may be sharded."""
    kinds = [type(tensor).__name__ for tensor in tensors if tensor is not None]
    if "DTensor" not in kinds:
        return
    if set(kinds) != {"DTensor"}:
        raise TypeError(
            f"{name}: takes DTensors in every place or in none, got {', '.join(kinds)}; distribute_tensor(..., "
            "placements=[Replicate()]) makes one of what every rank has"
        )
    _registration.shard_operators()


def outside_compilation(function: Callable[P, R]) -> Callable[P, R]:
    """A function that torch.compile does not look into, but calls: `torch.compiler.disable` once a compiler is loaded,
    which that would load (seconds).
    """
    disabled: Callable[P, R] | None = None

    def plain() -> Callable[P, R]:
        nonlocal disabled
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break()
        return plain()(*args, **kwargs)

    return run
