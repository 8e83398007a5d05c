"""One pass over the data between two decoder layers: a layer's last addition, its MoCa and the next RMSNorm, fused.

A layer of Llama's form ends with `h = residual + mlp(...)`, and what happens to h next is an RMSNorm. A `FusedLayer`
stands in for the forward of such a layer, a `FusedNorm` for that of the norm: the layer computes h and its norm
together, with `add_moca_rms_norm`, and the norm returns that result if it is given this very h. Otherwise (something
was added to h, a checkpoint recomputes a layer) the norm computes for itself. The residual stream that others see does
not change.

Autograd sets the conditions. The gradient of h lacks the part that came through the norm, so a pass in which someone
else holds h takes the plain way. So do checkpoints, which the result handed to the norm would bypass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from mir_kernels.ops.moca import MoCa, VisionMask, add_moca_rms_norm
from modality_integration.models.calibration import Calibration
from modality_integration.models.capture import Capture
from modality_integration.models.decoder import Decoder, unwrap
from modality_integration.models.forward_watch import ForwardPass
from modality_integration.models.llama_form import (
    LlamaLayer,
    forward_defaults,
    is_llama_layer,
    is_llama_norm,
    mlp_and_residual,
)
from modality_integration.models.moca_pass import FusedOutput

# In float64 Llama's RMSNorm rounds to float32 on the way, and the fused operation does not.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class FusedNorm:
    """Stands in for `norm.forward`, norm being a Llama RMSNorm: returns what the layer before it computed already."""

    def __init__(self, norm: nn.Module, calibration: Calibration) -> None:
        self.norm, self.calibration = norm, calibration

    def __call__(self, hidden_states: Tensor) -> Tensor:
        running = _running(self.calibration)
        fused = None if running is None else running.moca.take_fused()
        if fused is not None and self._serves(fused, hidden_states):
            return fused.normed
        return type(self.norm).forward(self.norm, hidden_states)

    def fuse(self, x: Tensor, residual: Tensor, moca: MoCa, mask: Tensor | VisionMask) -> FusedOutput:
        """h, MoCa of x + residual on the vision tokens, and the norm of h; x, residual (B, T, d), mask (B, T) bool."""
        weight, eps = cast(nn.Parameter, self.norm.weight), cast(float, self.norm.variance_epsilon)
        normed, h = add_moca_rms_norm(x, residual, moca.scale, moca.shift, mask, weight, eps=eps)
        return FusedOutput(h, normed, self.norm, h._version, weight._version, h.grad_fn, torch.is_grad_enabled())

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

    def _serves(self, fused: FusedOutput, x: Tensor) -> bool:
        """Whether the norm, given x, would compute `fused.normed` in the same graph, with nobody looking on."""
        weight = self.norm._parameters.get("weight")
        return (
            fused.norm is self.norm
            and weight is not None
            and fused.h is x
            and (x._version, weight._version) == (fused.h_version, fused.weight_version)
            and x.grad_fn is fused.grad_fn
            and torch.is_grad_enabled() == fused.recording
            and not _saves_elsewhere()
            and not _seen_by_others(self.norm, self.calibration)
        )


class FusedLayer:
    """Stands in for the forward of a decoder layer of Llama's form; `norm` is None where the layer stays plain."""

    def __init__(self, layer: nn.Module, norm: FusedNorm | None, calibration: Calibration) -> None:
        self.layer, self.norm, self.calibration = layer, norm, calibration
        self.defaults = forward_defaults(type(layer))
        layer.forward = self
        if norm is not None:
            norm.norm.forward = norm

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        running = _running(self.calibration)
        moca = None if running is None else self._fusable(hidden_states, running)
        mask = None if moca is None else self.calibration.mask(self.layer, hidden_states)
        if running is None or self.norm is None or moca is None or mask is None:
            return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)
        arguments = {**self.defaults, **dict(zip(self.defaults, args, strict=False)), **kwargs}
        x, residual = mlp_and_residual(cast(LlamaLayer, self.layer), hidden_states, **arguments)
        if type(x) is not Tensor or type(residual) is not Tensor or x.dtype != residual.dtype:
            return residual + x  # MoCa follows in its hook
        running.moca.fused = self.norm.fuse(x, residual, moca, self.calibration.shared(mask))
        return running.moca.fused.h

    def remove(self) -> None:
        """Gives layer and norm their own forwards back, unless someone has put another over these since."""
        _restore(self.layer, self)
        if self.norm is not None:
            _restore(self.norm.norm, self.norm)

    def _fusable(self, x: Tensor, running: ForwardPass) -> MoCa | None:
        """The layer's MoCa if this call can take the fused way, which is asked before anything is computed."""
        if x.shape[-2] == 1 or torch.is_inference_mode_enabled():
            return None
        layer = self.layer
        seen = _seen_by_others(layer, self.calibration)
        if torch.is_grad_enabled():
            checkpointed = getattr(layer, "gradient_checkpointing", False) and layer.training
            seen = seen or running.inputs.get("output_hidden_states") or checkpointed or _saves_elsewhere()
        if seen:
            # The layer's first norm then reads x itself: what others write to it, through .data or NumPy, is in no
            # version; and through that norm x gets all of its gradient.
            running.moca.fused = None
            return None
        if self.norm is None or type(x) is not Tensor or x.dtype not in DTYPES or not self.norm.takes(x):
            return None
        moca = layer._modules.get(self.calibration.name)
        if type(moca) is not MoCa or moca._forward_pre_hooks or moca._forward_hooks or "forward" in moca.__dict__:
            return None  # accelerate's stand-in for a forward fetches the parameters
        return moca


def fuse_layers(decoder: Decoder, why_not: Sequence[str | None], calibration: Calibration) -> list[FusedLayer]:
    """Puts stand-ins on the decoder's layers and norms; `why_not` holds the answer of `why_not_fused` for each layer.

    Layers of Llama's form that stay plain get one too, which keeps watch over what the layer before them handed on.
    """
    norms = [None if why else _fused_norm(decoder, i, calibration) for i, why in enumerate(why_not)]
    pairs = zip(decoder.layers, norms, strict=True)
    return [FusedLayer(layer, norm, calibration) for layer, norm in pairs if _has_llama_form(layer)]


def next_norm(decoder: Decoder, i: int) -> tuple[str | None, nn.Module | None]:
    """The norm that reads layer i's output first, with its name: the next layer's first norm, or the final norm."""
    if i + 1 == len(decoder.layers):
        return decoder.norm_name, decoder.norm
    norms = {n: child for n, child in decoder.layers[i + 1].named_children() if "norm" in type(child).__name__.lower()}
    name = next((n for n in norms if n in ("input_layernorm", "ln_1", "norm1", "self_attn_layer_norm")), None)
    return (None, None) if name is None else (f"{decoder.names[i + 1]}.{name}", norms[name])


def why_not_fused(model: nn.Module, decoder: Decoder, i: int) -> str | None:
    """What keeps layer i's last addition, its MoCa and the norm that reads it from being one operation, or None."""
    vision = getattr(getattr(unwrap(model), "config", None), "vision_config", None)
    if i < len(getattr(vision, "deepstack_visual_indexes", None) or ()):
        return "the model adds vision features to the output (DeepStack)"
    for layer in decoder.layers[i : i + 2]:
        if not _has_llama_form(layer):
            return f"{type(layer).__name__}'s forward is not of Llama's form"
    norm = next_norm(decoder, i)[1]
    if norm is None:
        return "no norm is known to read it"
    weight = norm._parameters.get("weight")
    kind: type = type(norm)  # as type[Module] mypy takes it for unhashable
    if weight is None or "forward" in norm.__dict__ or not is_llama_norm(kind):
        return f"{kind.__name__} is not Llama's RMSNorm"
    if weight.dtype not in DTYPES:
        return f"Llama's RMSNorm rounds {str(weight.dtype).removeprefix('torch.')} to float32"
    return None


def _fused_norm(decoder: Decoder, i: int, calibration: Calibration) -> FusedNorm | None:
    norm = next_norm(decoder, i)[1]
    return None if norm is None else FusedNorm(norm, calibration)


def _has_llama_form(layer: nn.Module) -> bool:
    """Whether the layer's forward is of Llama's form, and its class's own."""
    kind: type = type(layer)  # as in why_not_fused
    return "forward" not in layer.__dict__ and is_llama_layer(kind)


def _running(calibration: Calibration) -> ForwardPass | None:
    """The pass that this thread is in; None outside one, and under torch.compile, which takes the plain way."""
    return None if torch.compiler.is_compiling() else calibration.watch.running


def _restore(module: nn.Module, stand_in: FusedLayer | FusedNorm) -> None:
    """Takes `stand_in` off, so that `module` runs its class's forward, if it is still what `module` runs."""
    if module.__dict__.get("forward") is stand_in:
        del module.forward


def _seen_by_others(module: nn.Module, calibration: Calibration) -> bool:
    """Whether hooks that are not ours see what goes into or out of `module`."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return True
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(
        owner is not calibration and not isinstance(owner, Capture)
        for owner in (getattr(hook, "__self__", None) for hook in hooks)
    )


def _saves_elsewhere() -> bool:
    """Whether what autograd saves goes elsewhere now, as inside a checkpoint."""
    return torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
