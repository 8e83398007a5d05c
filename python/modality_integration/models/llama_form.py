"""Recognises decoder layers and norms that compute as Llama's do, by running their classes' forwards on small inputs.

A forward that does anything else, or that changes in another release of its library, is not recognised.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mir_kernels.ops.moca import add_moca_rms_norm


class LlamaLayer(Protocol):
    """The submodules of a decoder layer of Llama's form."""

    self_attn: Callable[..., tuple[Tensor, object]]
    input_layernorm: Callable[[Tensor], Tensor]
    post_attention_layernorm: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]


def mlp_and_residual(layer: LlamaLayer, hidden_states: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """The MLP's output and the residual, (B, T, d) each, whose sum is the output of a layer of Llama's form."""
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **arguments)
    residual = hidden_states + attended
    return layer.mlp(layer.post_attention_layernorm(residual)), residual


def forward_defaults(kind: type[nn.Module]) -> dict[str, Any]:
    """The named arguments of the class's forward after the hidden states, in order, with their defaults."""
    _, hidden_states, *others = inspect.signature(kind.forward).parameters.values()
    if hidden_states.name != "hidden_states":
        raise TypeError(f"{kind.__name__}.forward: expected hidden_states first, got {hidden_states.name}")
    empty = inspect.Parameter.empty
    return {p.name: None if p.default is empty else p.default for p in others if p.kind is not p.VAR_KEYWORD}


@functools.cache
def is_llama_layer(kind: type[nn.Module]) -> bool:
    """Whether the class's forward equals `mlp_and_residual` plus an addition, tested with stand-ins for submodules."""
    x = torch.linspace(-2, 2, 7, dtype=torch.float64, device="cpu")
    try:
        given = {name: object() for name in (*forward_defaults(kind), "another")}
        outcomes = []
        for forward in (kind.forward, lambda *args, **kwargs: torch.add(*mlp_and_residual(*args, **kwargs))):
            seen: list[dict[str, Any]] = []

            def attend(*, seen: list[dict[str, Any]] = seen, **kwargs: Any) -> tuple[Tensor, None]:
                seen.append(kwargs)
                return torch.sin(3 * kwargs["hidden_states"]), None

            parts = {
                "self_attn": attend,
                "input_layernorm": torch.cos,
                "post_attention_layernorm": torch.exp,
                "mlp": torch.tanh,
            }
            outcomes.append((forward(_with_parts(kind, parts), x, **given), seen))
        (theirs, (their_call,)), (ours, (our_call,)) = outcomes
        theirs_x, ours_x = their_call.pop("hidden_states"), our_call.pop("hidden_states")
        same = their_call == our_call and torch.equal(theirs_x, ours_x)
        return same and isinstance(theirs, Tensor) and torch.equal(theirs, ours)
    except Exception:  # other kinds of layers may fail in any way without their submodules
        return False


@functools.cache
def is_llama_norm(kind: type[nn.Module]) -> bool:
    """Whether the class's forward matches Llama's RMSNorm bit for bit, including its order of rounding."""
    drawn = torch.randn(9, 64, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu")
    x, weight = drawn.bfloat16().split((8, 1))
    parts = {"weight": weight[0], "variance_epsilon": 0.5}
    nothing = torch.zeros_like(x)
    expected, _ = add_moca_rms_norm(
        x, nothing, nothing[0], nothing[0], nothing[:, 0].bool(), weight[0], eps=0.5, backend="eager"
    )
    try:
        found = kind.forward(_with_parts(kind, parts), x)
        return isinstance(found, Tensor) and found.dtype == x.dtype and torch.equal(found, expected)
    except Exception:  # other kinds of norms may fail in any way without their parameters
        return False


def _with_parts(kind: type[nn.Module], parts: dict[str, Any]) -> nn.Module:
    """A module of `kind`, in eval mode, that holds `parts` and nothing else."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    module.eval()
    module.__dict__.update(parts)
    return module
