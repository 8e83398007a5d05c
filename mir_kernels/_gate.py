"""The check before every native and Triton call: may the memory of an argument be read at its address?

Raw calls read and write addresses. A trace does not record that, a subclass may have no memory, and the memory of a
negative view holds negated values. In all these cases the registered operator is called instead (`by_operator`), and
torch's dispatcher passes it plain tensors. Code without an operator uses the tensors that `with_memory` returns.
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

PLAIN = (Tensor, torch.nn.Parameter)  # other subclasses go through the dispatcher, where they can intervene


def by_operator(name: str, *tensors: Tensor | None) -> bool:
    """Whether to call the registered operator: under a trace or dispatch mode, or if an argument is not plain memory.

    Raises:
        RuntimeError: An argument is wrapped by a torch.func transform, or has a tangent, which would be dropped.
        TypeError: Some arguments are DTensors and others are not.
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
    """Whether `tensor` is None or can be read at its address: not a subclass, negative view, zero tensor or meta
    tensor."""
    return tensor is None or not (
        type(tensor) not in PLAIN or tensor.is_neg() or tensor._is_zerotensor() or tensor.is_meta
    )


def with_memory(name: str, argument: str, tensor: Tensor) -> Tensor:
    """`tensor` as plain memory that holds its values, for code that keeps state or has no operator.

    Raises:
        RuntimeError: There are no values: in a trace, under a torch.func transform, or for a fake tensor.
        TypeError: `tensor` is another subclass without plain memory, such as a DTensor.
    """
    watched = _len_torch_dispatch_stack() or _are_functorch_transforms_active() or _get_tracing_state() is not None
    if is_memory(tensor) and not watched:
        return tensor
    modes = _python_dispatch._get_current_dispatch_mode_stack()
    fake = _is_fake(tensor) or any(mode.is_infra_mode() for mode in modes)
    if fake or _functionalized(name, tensor) or _get_tracing_state() is not None:
        raise RuntimeError(
            f"{name}: requires tensors with values, so it does not support fake tensors, traces and functionalization"
        )
    if type(tensor) not in PLAIN and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__:
        tensor = tensor.as_subclass(Tensor)
    if type(tensor) in PLAIN:
        return tensor.clone() if tensor.is_neg() or tensor._is_zerotensor() else tensor
    found = tensor.detach().clone()  # waits for the result of an asynchronous collective
    if type(found) in PLAIN:
        return found
    advice = "; pass .to_local() or .full_tensor()" if type(tensor).__name__ == "DTensor" else ""
    raise TypeError(f"{argument}: expected a plain torch.Tensor, got {type(tensor).__name__}{advice}")


def _is_fake(tensor: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def _functionalized(name: str, *tensors: Tensor | None) -> bool:
    """Whether a tensor is wrapped by torch.func.functionalize, which supports operators.

    RuntimeError if one is wrapped by another transform, and so has no memory, or has a tangent, which would be dropped.
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
        f"{name}: torch.func transforms (vmap, grad, jvp) and forward-mode derivatives are not supported; use autograd "
        "if the operation has a gradient, and leading axes instead of vmap: arguments may have any number of them"
    )


def _look_for_dtensors(name: str, *tensors: Tensor | None) -> None:
    """Require that all tensors are DTensors or none is; register the sharding of the operators with the first ones."""
    kinds = [type(tensor).__name__ for tensor in tensors if tensor is not None]
    if "DTensor" not in kinds:
        return
    if set(kinds) != {"DTensor"}:
        raise TypeError(
            f"{name}: expected all tensors to be DTensors or none, got {', '.join(kinds)}; convert a tensor that is "
            "equal on all ranks by distribute_tensor(..., placements=[Replicate()])"
        )
    _registration.shard_operators()


def outside_compilation(function: Callable[P, R]) -> Callable[P, R]:
    """Make torch.compile call `function` without tracing into it.

    Applies `torch.compiler.disable`, but only once a compiler is loaded: the call itself would load one (seconds).
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
