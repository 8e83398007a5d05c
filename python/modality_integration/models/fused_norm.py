"""Fuses a decoder layer's last addition, its MoCa and the next RMSNorm into one pass over the data.

A layer of Llama's form ends with `h = residual + mlp(...)`, and the next operation on h is an RMSNorm. A `FusedLayer`
replaces the forward of such a layer, a `FusedNorm` that of the norm: the layer computes h and its norm together, with
`add_moca_rms_norm`, and the norm returns that result if its input is this very h. Otherwise (something was added to h,
or a checkpoint recomputes a layer) the norm is computed as usual. The residual stream that other code sees does not
change.

Autograd restricts where this is possible. The gradient of h lacks the part that flows through the norm, so a pass in
which other code holds h runs unfused. So do checkpoints, which the result handed to the norm would bypass.
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

# Not float64: there, Llama's RMSNorm rounds intermediate results to float32, and the fused operation does not.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class FusedNorm:
    """Replaces the forward of a Llama RMSNorm: returns the result that the preceding layer has already computed."""

    def __init__(self, norm: nn.Module, calibration: Calibration) -> None:
        self.norm, self.calibration = norm, calibration

    def __call__(self, hidden_states: Tensor) -> Tensor:
        running = _running(self.calibration)
        fused = None if running is None else running.moca.take_fused()
        if fused is not None and self._serves(fused, hidden_states):
            return fused.normed
        return type(self.norm).forward(self.norm, hidden_states)

    def fuse(self, x: Tensor, residual: Tensor, moca: MoCa, mask: Tensor | VisionMask) -> FusedOutput:
        """h (x + residual, with MoCa on the vision tokens) and its norm; x, residual (B, T, d), mask (B, T) bool."""
        weight, eps = cast(nn.Parameter, self.norm.weight), cast(float, self.norm.variance_epsilon)
        normed, h = add_moca_rms_norm(x, residual, moca.scale, moca.shift, mask, weight, eps=eps)
        return FusedOutput(h, normed, self.norm, h._version, weight._version, h.grad_fn, torch.is_grad_enabled())

    def takes(self, x: Tensor) -> bool:
        """Whether the weight is unsharded, on x's device, and of x's dtype, so that the norm's result has it too."""
        weight = self.norm._parameters.get("weight")
        return (
            self.norm.__dict__.get("forward") is self
            and type(weight) is nn.Parameter
            and weight.shape == x.shape[-1:]
            and weight.dtype == x.dtype
            and weight.device == x.device
        )

    def _serves(self, fused: FusedOutput, x: Tensor) -> bool:
        """Whether the norm of x would be `fused.normed`, in the same autograd graph and unseen by foreign hooks."""
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
    """Replaces the forward of a decoder layer of Llama's form; `norm` is None if the layer stays unfused."""

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
            return residual + x  # the hook applies MoCa
        running.moca.fused = self.norm.fuse(x, residual, moca, self.calibration.shared(mask))
        return running.moca.fused.h

    def remove(self) -> None:
        """Restores the forwards of layer and norm, unless other code has replaced them since."""
        _restore(self.layer, self)
        if self.norm is not None:
            _restore(self.norm.norm, self.norm)

    def _fusable(self, x: Tensor, running: ForwardPass) -> MoCa | None:
        """The layer's MoCa if this call can be fused, else None; checked before anything is computed."""
        if x.shape[-2] == 1 or torch.is_inference_mode_enabled():
            return None
        layer = self.layer
        seen = _seen_by_others(layer, self.calibration)
        if torch.is_grad_enabled():
            checkpointed = getattr(layer, "gradient_checkpointing", False) and layer.training
            seen = seen or running.inputs.get("output_hidden_states") or checkpointed or _saves_elsewhere()
        if seen:
            # The layer's first norm then reads x itself. Writes to x through .data or NumPy do not change its version,
            # and x must get its full gradient through that norm.
            running.moca.fused = None
            return None
        if self.norm is None or type(x) is not Tensor or x.dtype not in DTYPES or not self.norm.takes(x):
            return None
        moca = layer._modules.get(self.calibration.name)
        if type(moca) is not MoCa or moca._forward_pre_hooks or moca._forward_hooks or "forward" in moca.__dict__:
            return None  # accelerate's replacement forward fetches the parameters
        return moca


def fuse_layers(decoder: Decoder, why_not: Sequence[str | None], calibration: Calibration) -> list[FusedLayer]:
    """Replaces forwards of the decoder's layers and norms; `why_not` holds `why_not_fused` of each layer.

    Unfused layers of Llama's form are replaced too, because they must check the result of the preceding layer.
    """
    norms = [None if why else _fused_norm(decoder, i, calibration) for i, why in enumerate(why_not)]
    pairs = zip(decoder.layers, norms, strict=True)
    return [FusedLayer(layer, norm, calibration) for layer, norm in pairs if _has_llama_form(layer)]


def next_norm(decoder: Decoder, i: int) -> tuple[str | None, nn.Module | None]:
    """The name and module of the norm that reads layer i's output: the next layer's first norm, or the final norm."""
    if i + 1 == len(decoder.layers):
        return decoder.norm_name, decoder.norm
    norms = {n: child for n, child in decoder.layers[i + 1].named_children() if "norm" in type(child).__name__.lower()}
    name = next((n for n in norms if n in ("input_layernorm", "ln_1", "norm1", "self_attn_layer_norm")), None)
    return (None, None) if name is None else (f"{decoder.names[i + 1]}.{name}", norms[name])


def why_not_fused(model: nn.Module, decoder: Decoder, i: int) -> str | None:
    """Why layer i's last addition, its MoCa and the norm that reads it cannot be fused; None if they can."""
    vision = getattr(getattr(unwrap(model), "config", None), "vision_config", None)
    if i < len(getattr(vision, "deepstack_visual_indexes", None) or ()):
        return "the model adds vision features to the output (DeepStack)"
    for layer in decoder.layers[i : i + 2]:
        if not _has_llama_form(layer):
            return f"{type(layer).__name__}'s forward does not have Llama's form"
    norm = next_norm(decoder, i)[1]
    if norm is None:
        return "no norm that reads it was found"
    weight = norm._parameters.get("weight")
    kind: type = type(norm)  # mypy considers type[Module] unhashable
    if weight is None or "forward" in norm.__dict__ or not is_llama_norm(kind):
        return f"{kind.__name__} is not Llama's RMSNorm"
    if weight.dtype not in DTYPES:
        return f"Llama's RMSNorm rounds {str(weight.dtype).removeprefix('torch.')} to float32"
    return None


def _fused_norm(decoder: Decoder, i: int, calibration: Calibration) -> FusedNorm | None:
    norm = next_norm(decoder, i)[1]
    return None if norm is None else FusedNorm(norm, calibration)


def _has_llama_form(layer: nn.Module) -> bool:
    """Whether the layer's forward has Llama's form and has not been replaced on the instance."""
    kind: type = type(layer)  # as in why_not_fused
    return "forward" not in layer.__dict__ and is_llama_layer(kind)


def _running(calibration: Calibration) -> ForwardPass | None:
    """The pass that this thread is running; None outside one, and under torch.compile, which runs unfused."""
    return None if torch.compiler.is_compiling() else calibration.watch.running


def _restore(module: nn.Module, stand_in: FusedLayer | FusedNorm) -> None:
    """Restores the class's forward of `module` if its current forward is `stand_in`."""
    if module.__dict__.get("forward") is stand_in:
        del module.forward


def _seen_by_others(module: nn.Module, calibration: Calibration) -> bool:
    """Whether foreign hooks see the inputs or outputs of `module`."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return True
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(
        owner is not calibration and not isinstance(owner, Capture)
        for owner in (getattr(hook, "__self__", None) for hook in hooks)
    )


def _saves_elsewhere() -> bool:
    """Whether hooks intercept the tensors that autograd saves, as inside a checkpoint."""
    return torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
