"""Every public operation as a function of one tensor, with such a tensor; comparison of results and errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

import mir_kernels as mk
from kernels.moca.calls import Wrapped

GENERATOR = torch.Generator("cpu").manual_seed(0)
D = 6


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float32, device="cpu")


def covariances(count: int, d: int = D) -> Tensor:
    x = draw(count, 4 * d, d)
    return (x.mT @ x / (4 * d)).clone()


class Call(NamedTuple):
    """function(tensor, wrap): wrap converts the other tensors to the kind of `tensor`; argument: its name."""

    function: Callable[..., Any]
    tensor: Tensor
    argument: str


def identity(tensor: Tensor, *_: Any) -> Tensor:
    return tensor


SCALE, SHIFT, WEIGHT, RESIDUAL = draw(D), draw(D), draw(D), draw(4, 3, D)
MASK = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.bool, device="cpu")
OTHER, MEAN_X, MEAN_Y = covariances(4), draw(4, D), draw(4, D)

CALLS = {
    "moca": Call(lambda x, w=identity: mk.moca(x, w(SCALE), w(SHIFT), w(MASK, 0)), draw(4, 3, D), "x"),
    "add_moca_rms_norm": Call(
        lambda x, w=identity: mk.add_moca_rms_norm(x, w(RESIDUAL, 0), w(SCALE), w(SHIFT), w(MASK, 0), w(WEIGHT)),
        draw(4, 3, D),
        "x",
    ),
    "token_norms": Call(lambda x, w=identity: mk.token_norms(x), draw(4, 3, D), "x"),
    "sqrtm": Call(lambda a, w=identity: mk.sqrtm(a, method="polar"), covariances(4), "a"),
    "inverse_sqrtm": Call(lambda a, w=identity: mk.inverse_sqrtm(a), covariances(4), "a"),
    "polar": Call(lambda m, w=identity: mk.polar(m), draw(4, 5, D), "m"),
    "newton_schulz": Call(lambda a, w=identity: mk.newton_schulz(a, iterations=20), covariances(4), "a"),
    "trace_sqrt_product": Call(
        lambda a, w=identity: mk.trace_sqrt_product(a, w(OTHER, 0), bounds=True), covariances(4), "a"
    ),
    "frechet_distance": Call(
        lambda c, w=identity: mk.frechet_distance(w(MEAN_X, 0), c, w(MEAN_Y, 0), w(OTHER, 0)),
        covariances(4),
        "cov_x",
    ),
}


class Named(torch.Tensor):
    """A subclass with its own memory, as in many libraries."""


LAYOUTS = {
    "negative view": lambda x: torch._neg_view(-x),
    "transposed negative view": lambda x: torch._neg_view(-x.transpose(0, -1).contiguous()).transpose(0, -1),
    "subclass with memory": lambda x: x.clone().as_subclass(Named),
    "subclass without memory": Wrapped,
    "parameter": lambda x: torch.nn.Parameter(x.clone()),
    "every other element": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "in a larger storage": lambda x: torch.cat([x.new_full((7,), torch.nan), x.reshape(-1)])[7:].view(x.shape),
}


def unwrapped(found: Any) -> Any:
    """The tensors of a result without the subclass of the argument."""
    if not isinstance(found, list):
        return found
    found = [value.as_subclass(Tensor) if type(value) is Named else value for value in found]
    return [value.inner if isinstance(value, Wrapped) else value for value in found]


def outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    """The results as plain tensors, or the type and text of an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            found = function(*arguments)
        except (TypeError, ValueError) as error:
            return type(error), str(error)
    return [value.detach() if type(value) is Tensor else value for value in tree_flatten(found)[0]]


def same(found: Any, wanted: Any) -> bool:
    if not isinstance(found, list) or not isinstance(wanted, list):
        return found == wanted
    return len(found) == len(wanted) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, wanted, strict=True)
    )


def shapes(found: Any) -> Any:
    return tree_map(lambda value: (tuple(value.shape), value.dtype), tree_flatten(found)[0])
