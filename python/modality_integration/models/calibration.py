"""Run-time state shared by a model's MoCa modules: the vision tokens of the running pass, the hook that calibrates
each layer's output, and whether that hook may overwrite the output in place."""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from mir_kernels._warnings import warn
from mir_kernels.ops.moca import VisionMask
from modality_integration.models.decoder import Decoder, LayerOutput
from modality_integration.models.forward_watch import ForwardPass, ForwardWatch
from modality_integration.models.placement import gathered_by_all, may_be_trained_in_float32

HELD_AS = "_moca"  # the attribute of a decoder layer that holds its calibration


class Removable(Protocol):
    """Something installed on a model: a hook handle, a watch, a replacement for a forward."""

    def remove(self) -> None:
        """Uninstalls it."""


class Calibration:
    """Applies the MoCa of every decoder layer (its submodule `name`) to the vision tokens of the running pass.

    `vision` overrides the model's own marker: a (B, T) mask, or the name of the forward argument that carries one.
    Hooks are methods of this object, so a deep copy of the model gets a separate calibration.
    """

    def __init__(
        self, watch: ForwardWatch, decoder: Decoder, name: str, size: int, vision: Tensor | str | None
    ) -> None:
        self.watch, self.name, self.size = watch, name, size
        self.vision = vision
        self._model, self._layers = decoder.path[0], decoder.layers
        # On the innermost module around the layers: wrappers call some of the outer ones without running their hooks.
        looking = decoder.path[-1].register_forward_pre_hook(self._look_at_dtypes)
        self.placed: list[Removable] = [watch, looking]
        self.told_of_dtypes = self._looked_at_dtypes = False
        # Masks of passes that backward may still recompute, for checkpoints that wrap a layer including its hooks.
        self._replayable: deque[Tensor] = deque(maxlen=64)
        self._replayed = False

    def place(self, layer: nn.Module) -> None:
        """Stores this calibration on `layer` and registers the hook that applies its MoCa."""
        setattr(layer, HELD_AS, self)
        self.placed.append(layer.register_forward_hook(self.apply))

    def remove(self) -> None:
        """Uninstalls everything that this calibration put on the model, except the layers' reference to it."""
        for part in self.placed:
            part.remove()
        self.placed.clear()

    def _look_at_dtypes(self, decoder: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the decoder: warns once, before a training pass, if MoCa was cast to 16 bits.

        Checks all layers in the first such pass and only the first layer afterwards, since models are cast as a whole.
        """
        if torch.compiler.is_compiling() or self.told_of_dtypes or not torch.is_grad_enabled():
            return
        layers = self._layers[:1] if self._looked_at_dtypes else self._layers
        self._looked_at_dtypes = True
        trained = [p for layer in layers for p in getattr(layer, self.name).parameters() if p.requires_grad]
        narrow = [p for p in trained if p.is_floating_point() and p.element_size() < 4]
        if not narrow:
            return
        self.told_of_dtypes = True
        if not may_be_trained_in_float32(self._model, narrow):
            warn(
                f"MoCa: {unmoved_by(narrow[0].dtype)} (unless the optimizer keeps float32 copies), and the model was "
                "cast to it after add_moca. Before creating the optimizer, run "
                "for p in moca_parameters(model): p.data = p.data.float()",
                UserWarning,
            )

    def apply(self, layer: nn.Module, args: tuple[Any, ...], output: LayerOutput) -> LayerOutput | None:
        """Forward hook of a decoder layer: returns its output after MoCa, or None to leave the output unchanged."""
        state: Tensor = output[0] if isinstance(output, tuple) else output
        if self.watch.running is not None and self.watch.running.moca.has_calibrated(state):
            return None
        if state.dim() != 3 or state.shape[-1] != self.size:
            raise ValueError(
                f"model: expected one state of {self.size} values per token from every layer, shape (B, T, "
                f"{self.size}), got {tuple(state.shape)} from {type(layer).__name__}; MoCa does not support models "
                "with several residual streams per token or without a batch dimension"
            )
        mask = self.mask(layer, state)
        if mask is None:
            return None
        moca = getattr(layer, self.name)
        # FSDP passes views of the inputs to a separately sharded module, and autograd forbids overwriting those.
        inplace = not moca._forward_pre_hooks and self._sees_first(layer) and _may_overwrite(state, args)
        seen = moca._forward_pre_hooks or moca._forward_hooks  # foreign hooks expect the mask as a tensor
        state = moca(state, mask if seen else self.shared(mask), inplace=inplace)
        return (state, *output[1:]) if isinstance(output, tuple) else state

    def mask(self, layer: nn.Module, state: Tensor) -> Tensor | None:
        """(B, T) bool, True at vision tokens, on the device of `state` (B, T, d); None if there is nothing to do."""
        shape, running = (state.shape[0], state.shape[1]), self.watch.running
        if running is None:
            return self._mask_outside(shape).to(state.device)
        moca = running.moca
        if moca.vision is None:
            generation = running.generation(shape[1])
            beyond = 0 if generation is None else generation.beyond
            # A decoding step has no vision tokens, even if the generated id is the image placeholder id.
            if beyond is None or (running.continues(shape[1]) and not running.is_marked(self.vision)):
                vision = torch.zeros(shape, dtype=torch.bool, device=state.device)
            else:
                vision = running.vision(shape, self.vision)
                if beyond:
                    vision[:, -beyond:] = False
            moca.idle = not torch.compiler.is_compiling() and not bool(vision.any())
            moca.vision = vision
            self._remember(running, vision)
        if moca.idle and not _needed_by_other_processes(getattr(layer, self.name)):
            return None
        return moca.mask_for(state)

    def shared(self, mask: Tensor) -> Tensor | VisionMask:
        """`mask` as the VisionMask shared by all layers of the pass; `mask` itself outside a pass or when compiling."""
        running = self.watch.running
        if running is None or running.moca.vision is not mask or torch.compiler.is_compiling():
            return mask
        return running.moca.shared_mask()

    def _sees_first(self, layer: nn.Module) -> bool:
        """Whether this hook runs before all foreign hooks, which might have kept the layer's output."""
        first = next(iter(layer._forward_hooks.values()))
        return not torch_module._global_forward_hooks and getattr(first, "__self__", None) is self

    def _remember(self, running: ForwardPass, vision: Tensor) -> None:
        if torch.compiler.is_compiling() or not running.differentiable:
            return
        if self._replayed:
            self._replayable.clear()
            self._replayed = False
        self._replayable.append(vision)

    def _mask_outside(self, shape: tuple[int, int]) -> Tensor:
        """The mask for a layer that runs outside a pass: the caller's, or that of the pass being recomputed."""
        if isinstance(self.vision, Tensor):
            if tuple(self.vision.shape) != shape:
                raise ValueError(f"mask: expected one entry per token, shape {shape}, got {tuple(self.vision.shape)}")
            return self.vision != 0
        if torch._C._current_graph_task_id() == -1:  # not inside backward
            raise RuntimeError(
                "MoCa: a decoder layer ran outside a forward pass of the model, so its vision tokens are unknown; "
                "run the model that was passed to add_moca, or use vision_tokens"
            )
        self._replayed = True
        masks = [mask for mask in self._replayable if tuple(mask.shape) == shape]
        if not masks or not all(torch.equal(masks[0], mask) for mask in masks[1:]):
            raise RuntimeError(
                "MoCa: a checkpoint around whole decoder layers is recomputed after several forward passes, and it is "
                "unknown which one; run backward after each pass, or use the model's own gradient checkpointing"
            )
        return masks[0]


def unmoved_by(dtype: torch.dtype) -> str:
    """Why scale and shift should not have `dtype`, of 16 bits, as part of a warning."""
    step = torch.finfo(dtype).eps / 4  # half the distance to the next number below 1
    return f"in {str(dtype).removeprefix('torch.')}, updates smaller than {step:.1g} leave a scale of 1 unchanged"


def is_calibrated(module: nn.Module) -> bool:
    """Whether `module` is a decoder layer with MoCa."""
    return HELD_AS in module.__dict__


def calibration_of(layer: nn.Module) -> Calibration:
    """The calibration of a decoder layer with MoCa."""
    return layer.__dict__[HELD_AS]


def _needed_by_other_processes(moca: nn.Module) -> bool:
    """Whether other processes wait for this one to use the layer's MoCa, to gather its shards or gradients."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_world_size() == 1:
        return False
    parameters = list(moca.parameters())
    # Only a separately sharded MoCa: one sharded with its layer has been gathered by now.
    sharded = hasattr(moca, "_fsdp_wrapped_module") or any(map(gathered_by_all, parameters))
    return sharded or (torch.is_grad_enabled() and any(p.requires_grad for p in parameters))


def _may_overwrite(state: Tensor, args: tuple[Any, ...]) -> bool:
    """Whether nothing else reads this layer output: it is neither a view nor the input, nor saved by autograd."""
    if torch.compiler.is_compiling() or (args and state is args[0]) or state._is_view():
        return False
    if not torch.is_grad_enabled() or not state.requires_grad:
        return True
    # Neither the residual addition nor a checkpoint around it saves its result.
    return state.grad_fn is not None and state.grad_fn.name() in ("AddBackward0", "CheckpointFunctionBackward")
