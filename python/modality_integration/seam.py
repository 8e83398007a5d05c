"""Between two decoder layers in one pass over the data: the last addition of a layer, its MoCa, the next RMSNorm.

A layer of Llama's form ends with `h = residual + mlp(...)`, and what happens to h next is an RMSNorm. A `Seam` stands
in for the forward of such a layer, a `Reader` for that of the norm: the layer computes h and its norm together, with
`add_moca_rms_norm`, and the norm returns what was handed over where it is given this very h. Anywhere else (something
was added to h, a checkpoint recomputes a layer) it computes for itself. The stream that others see is h as ever.

Autograd takes part, which sets the conditions. The gradient of h then lacks what came by the norm, so a pass in which
someone else holds h keeps the plain way, as do checkpoints: what is handed over would bypass them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from mir_kernels.moca import MoCa, add_moca_rms_norm
from modality_integration.decoder import Decoder, unwrap
from modality_integration.masks import ForwardWatch
from modality_integration.residual_stream import Capture

# In float64 Llama's RMSNorm rounds to float32 on the way, and the fused operation does not.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HANDED = "handed"  # in what a forward pass has found


class Calibration(Protocol):
    """What a seam asks of those who put MoCa into the model."""

    watch: ForwardWatch

    def mask(self, layer: nn.Module, state: Tensor) -> Tensor | None:
        """(B, T) bool, True at the vision tokens of this pass; None where MoCa has nothing to do."""


class Handed(NamedTuple):
    """A layer's output h and what the norm makes of it, with all that must not have changed when the norm asks."""

    h: Tensor
    normed: Tensor
    reader: Reader
    h_version: int
    weight_version: int
    grad_fn: Any
    recording: bool

    def serves(self, reader: Reader, x: Tensor) -> bool:
        """Whether `reader`, given x, would compute `normed`, in the same graph."""
        weight = reader.norm._parameters["weight"]
        return (
            reader is self.reader
            and x is self.h
            and (x._version, weight._version) == (self.h_version, self.weight_version)
            and x.grad_fn is self.grad_fn
            and torch.is_grad_enabled() == self.recording
            and not _records_otherwise()
        )


class Reader:
    """Stands in for `norm.forward`, norm being a Llama RMSNorm."""

    def __init__(self, norm: Any, calibration: Calibration) -> None:
        self.norm, self.calibration = norm, calibration

    def __call__(self, hidden_states: Tensor) -> Tensor:
        running = None if torch.compiler.is_compiling() else self.calibration.watch.running
        handed = None if running is None else running.found.pop(HANDED, None)
        if handed is not None and not _others_look(self.norm, self.calibration) and handed.serves(self, hidden_states):
            return handed.normed
        return type(self.norm).forward(self.norm, hidden_states)

    def takes(self, x: Tensor) -> bool:
        """Whether its weight is here, whole, and of a dtype that makes the norm's result one of x's dtype."""
        weight = self.norm._parameters.get("weight")
        return (
            self.norm.__dict__.get("forward") is self
            and type(weight) is nn.Parameter
            and weight.shape == x.shape[-1:]
            and weight.dtype == x.dtype
            and weight.device == x.device
        )


class Seam:
    """Stands in for the forward of a decoder layer of Llama's form; `reader` is None where the layer stays plain."""

    def __init__(self, layer: Any, name: str, reader: Reader | None, calibration: Calibration) -> None:
        self.layer, self.name, self.reader, self.calibration = layer, name, reader, calibration
        self.defaults = _defaults(type(layer))
        layer.forward = self
        if reader is not None:
            reader.norm.forward = reader

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        moca = self._moca(hidden_states)
        mask = None if moca is None else self.calibration.mask(self.layer, hidden_states)
        if mask is None:
            return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)
        arguments = {**self.defaults, **dict(zip(self.defaults, args, strict=False)), **kwargs}
        x, residual = _before_the_last_addition(self.layer, hidden_states, **arguments)
        if type(x) is not Tensor or type(residual) is not Tensor or x.dtype != residual.dtype:
            return residual + x  # MoCa follows in its hook
        assert self.reader is not None
        norm = self.reader.norm
        normed, h = add_moca_rms_norm(x, residual, moca.scale, moca.shift, mask, norm.weight, eps=norm.variance_epsilon)
        running: Any = self.calibration.watch.running
        running.found[HANDED] = Handed(
            h, normed, self.reader, h._version, norm.weight._version, h.grad_fn, torch.is_grad_enabled()
        )
        return h

    def remove(self) -> None:
        """Give layer and norm their own forwards back, unless someone has put another over these since."""
        for module, ours in ((self.layer, self), (getattr(self.reader, "norm", None), self.reader)):
            if module is not None and module.__dict__.get("forward") is ours:
                del module.forward

    def _moca(self, x: Tensor) -> Any:
        """The layer's MoCa if this call can take the fused way, which is asked before anything is computed."""
        running = None if torch.compiler.is_compiling() else self.calibration.watch.running
        if running is None or x.shape[-2] == 1 or torch.is_inference_mode_enabled():
            return None
        layer = self.layer
        if torch.is_grad_enabled():
            looked_at = running.inputs.get("output_hidden_states") or _others_look(layer, self.calibration)
            if (
                looked_at
                or _records_otherwise()
                or (getattr(layer, "gradient_checkpointing", False) and layer.training)
            ):
                running.found.pop(HANDED, None)
                return None
        if self.reader is None or type(x) is not Tensor or x.dtype not in DTYPES or not self.reader.takes(x):
            return None
        moca = layer._modules.get(self.name)
        hooked = moca is not None and (moca._forward_pre_hooks or moca._forward_hooks)
        return None if type(moca) is not MoCa or hooked else moca


def place(decoder: Decoder, plain: Sequence[str | None], name: str, calibration: Calibration) -> list[Seam]:
    """Seams on the decoder's layers; `plain` are the reasons of `why_plain`, `name` is that of MoCa on a layer.

    Plain layers of the form get one too: it keeps watch over what the layer before hands it.
    """
    readers = [None if why else Reader(reader_of(decoder, i)[1], calibration) for i, why in enumerate(plain)]
    pairs = zip(decoder.layers, readers, strict=True)
    return [Seam(layer, name, reader, calibration) for layer, reader in pairs if _fits(layer)]


def made(found: dict[str, Any], state: Tensor) -> bool:
    """Whether `state`, a layer's output, has MoCa in it already."""
    handed = found.get(HANDED)
    return handed is not None and handed.h is state


def reader_of(decoder: Decoder, i: int) -> tuple[str | None, nn.Module | None]:
    """The norm that reads layer i's output first, with its name: the next layer's first norm, or the final norm."""
    if i + 1 == len(decoder.layers):
        return decoder.norm_name, decoder.norm
    norms = {n: child for n, child in decoder.layers[i + 1].named_children() if "norm" in type(child).__name__.lower()}
    name = next((n for n in norms if n in ("input_layernorm", "ln_1", "norm1", "self_attn_layer_norm")), None)
    return (None, None) if name is None else (f"{decoder.names[i + 1]}.{name}", norms[name])


def why_plain(model: nn.Module, decoder: Decoder, i: int) -> str | None:
    """What keeps layer i's last addition, its MoCa and the norm that reads it from being one operation, or None."""
    vision: Any = getattr(getattr(unwrap(model), "config", None), "vision_config", None)
    if i < len(getattr(vision, "deepstack_visual_indexes", None) or ()):
        return "the model adds vision features to the output (DeepStack)"
    for layer in decoder.layers[i : i + 2]:
        if not _fits(layer):
            return f"{type(layer).__name__}'s forward is not of Llama's form"
    norm = reader_of(decoder, i)[1]
    if norm is None:
        return "no norm is known to read it"
    weight = norm._parameters.get("weight")
    kind: Any = type(norm)
    if weight is None or "forward" in norm.__dict__ or not _is_llama_norm(kind):
        return f"{kind.__name__} is not Llama's RMSNorm"
    if weight.dtype not in DTYPES:
        return f"Llama's RMSNorm rounds {str(weight.dtype).removeprefix('torch.')} to float32"
    return None


def _fits(layer: nn.Module) -> bool:
    """Whether the layer's forward is of Llama's form, and its class's own."""
    kind: Any = type(layer)
    return "forward" not in layer.__dict__ and _is_llama_layer(kind)


def _before_the_last_addition(layer: Any, hidden_states: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """The MLP's output and the residual that a layer of Llama's form ends with adding."""
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **arguments)
    residual = hidden_states + attended
    return layer.mlp(layer.post_attention_layernorm(residual)), residual


@functools.cache
def _is_llama_layer(kind: Any) -> bool:
    """Whether the class's forward does what `_before_the_last_addition` and an addition do.

    Found by running both on stand-ins for the layer's parts, so a forward that touches anything else, or changes in
    another release of its library, is not taken for the known one.
    """
    x = torch.linspace(-2, 2, 7, dtype=torch.float64, device="cpu")
    try:
        given = {name: object() for name in (*_defaults(kind), "another")}
        outcomes = []
        for forward in (kind.forward, lambda *args, **kwargs: torch.add(*_before_the_last_addition(*args, **kwargs))):
            seen: list[dict[str, Any]] = []

            def attend(*, seen: list = seen, **kwargs: Any) -> tuple[Tensor, None]:
                seen.append(kwargs)
                return torch.sin(3 * kwargs["hidden_states"]), None

            parts = {
                "self_attn": attend,
                "input_layernorm": torch.cos,
                "post_attention_layernorm": torch.exp,
                "mlp": torch.tanh,
            }
            outcomes.append((forward(_stand_in(kind, parts), x, **given), seen))
        (theirs, (their_call,)), (ours, (our_call,)) = outcomes
        theirs_x, ours_x = their_call.pop("hidden_states"), our_call.pop("hidden_states")
        same = their_call == our_call and torch.equal(theirs_x, ours_x)
        return same and isinstance(theirs, Tensor) and torch.equal(theirs, ours)
    except Exception:  # whatever another kind of layer does without its parts
        return False


@functools.cache
def _is_llama_norm(kind: Any) -> bool:
    """Whether the class's forward gives the bits of Llama's RMSNorm, in its order of rounding."""
    drawn = torch.randn(9, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    x, weight = drawn.bfloat16().split((8, 1))
    parts = {"weight": weight[0], "variance_epsilon": 0.5}
    nothing = torch.zeros_like(x)
    expected, _ = add_moca_rms_norm(
        x, nothing, nothing[0], nothing[0], nothing[:, 0].bool(), weight[0], eps=0.5, backend="eager"
    )
    try:
        found: Any = kind.forward(_stand_in(kind, parts), x)
        return isinstance(found, Tensor) and found.dtype == x.dtype and torch.equal(found, expected)
    except Exception:  # as above
        return False


def _stand_in(kind: type[nn.Module], parts: dict[str, Any]) -> Any:
    """A module of `kind` that holds `parts` and nothing else."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    module.eval()
    module.__dict__.update(parts)
    return module


def _defaults(kind: type[nn.Module]) -> dict[str, Any]:
    """The named arguments of the class's forward after the hidden states, in order, with their defaults."""
    _, hidden_states, *others = inspect.signature(kind.forward).parameters.values()
    if hidden_states.name != "hidden_states":
        raise TypeError(f"{kind.__name__}.forward takes {hidden_states.name} first")
    empty = inspect.Parameter.empty
    return {p.name: None if p.default is empty else p.default for p in others if p.kind is not p.VAR_KEYWORD}


def _others_look(module: nn.Module, calibration: Calibration) -> bool:
    """Whether hooks that are not ours see what goes into or out of `module` in a pass that autograd records."""
    if not torch.is_grad_enabled():
        return False
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return True
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(
        owner is not calibration and not isinstance(owner, Capture)
        for owner in (getattr(hook, "__self__", None) for hook in hooks)
    )


def _records_otherwise() -> bool:
    """Whether what autograd saves goes elsewhere now, as inside a checkpoint."""
    return torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
