"""What the MoCa modules of one model share at run time: which tokens of a pass are vision tokens, what each layer's
hook does with them, and whether it may write into the layer's output."""

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
    """What was put on a model: a hook's handle, a watch, a forward's stand-in."""

    def remove(self) -> None:
        """Takes it off the model."""


class Calibration:
    """Applies the MoCa of every decoder layer, the submodule `name`, to the vision tokens of the running pass.

    `vision` overrules the model's own marker: a (B, T) mask, or the name of the forward argument that carries one.
    Hooks are methods of this object, so a deep copy of the model gets a calibration of its own.
    """

    def __init__(
        self, watch: ForwardWatch, decoder: Decoder, name: str, size: int, vision: Tensor | str | None
    ) -> None:
        self.watch, self.name, self.size = watch, name, size
        self.vision = vision
        self._model, self._layers = decoder.path[0], decoder.layers
        # The innermost module around the layers: wrappers call some of the outer ones past their hooks.
        looking = decoder.path[-1].register_forward_pre_hook(self._look_at_dtypes)
        self.placed: list[Removable] = [watch, looking]
        self.told_of_dtypes = self._looked_at_dtypes = False
        # Masks of passes that may yet be recomputed in backward, for checkpoints that wrap a layer with its hooks.
        self._replayable: deque[Tensor] = deque(maxlen=64)
        self._replayed = False

    def place(self, layer: nn.Module) -> None:
        """Lets `layer` hold this calibration, with a hook that applies its MoCa."""
        setattr(layer, HELD_AS, self)
        self.placed.append(layer.register_forward_hook(self.apply))

    def remove(self) -> None:
        """Takes off the model all that was put on it for this calibration; layers go on holding it."""
        for part in self.placed:
            part.remove()
        self.placed.clear()

    def _look_at_dtypes(self, decoder: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the decoder: a warning, once, before a training pass with a MoCa that has become narrow.

        After the first such pass it looks at the first layer alone, since a model is cast whole.
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
                "cast to it after add_moca. Before an optimizer is made: "
                "for p in moca_parameters(model): p.data = p.data.float()",
                UserWarning,
            )

    def apply(self, layer: nn.Module, args: tuple[Any, ...], output: LayerOutput) -> LayerOutput | None:
        """Forward hook of a decoder layer: its output after MoCa, or None where the output stays as it is."""
        state: Tensor = output[0] if isinstance(output, tuple) else output
        if self.watch.running is not None and self.watch.running.moca.has_calibrated(state):
            return None
        if state.dim() != 3 or state.shape[-1] != self.size:
            raise ValueError(
                f"model: MoCa takes one output of {self.size} numbers a token from every layer, shape (B, T, "
                f"{self.size}), got {tuple(state.shape)} from {type(layer).__name__}; a model that keeps several "
                "residual streams a token, or none by rows, cannot have MoCa"
            )
        mask = self.mask(layer, state)
        if mask is None:
            return None
        moca = getattr(layer, self.name)
        # A module sharded on its own is handed views of its inputs by FSDP, which autograd does not let it overwrite.
        inplace = not moca._forward_pre_hooks and self._sees_first(layer) and _may_overwrite(state, args)
        seen = moca._forward_pre_hooks or moca._forward_hooks  # by others, who know a mask as a tensor
        state = moca(state, mask if seen else self.shared(mask), inplace=inplace)
        return (state, *output[1:]) if isinstance(output, tuple) else state

    def mask(self, layer: nn.Module, state: Tensor) -> Tensor | None:
        """(B, T) bool, True at vision tokens, where `state` (B, T, d) lies; None where there is nothing to do."""
        shape, running = (state.shape[0], state.shape[1]), self.watch.running
        if running is None:
            return self._mask_outside(shape).to(state.device)
        moca = running.moca
        if moca.vision is None:
            generation = running.generation(shape[1])
            beyond = 0 if generation is None else generation.beyond
            # A decoding step: also where the id that was generated is that of images.
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
        """The mask that `mask` gave, as all layers of the pass share it; itself outside a pass and in compiled code."""
        running = self.watch.running
        if running is None or running.moca.vision is not mask or torch.compiler.is_compiling():
            return mask
        return running.moca.shared_mask()

    def _sees_first(self, layer: nn.Module) -> bool:
        """Whether no hook of others has seen the layer's output: it may have kept it."""
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
        """The mask of a layer that runs outside a pass: the caller's, or that of the pass that backward recomputes."""
        if isinstance(self.vision, Tensor):
            if tuple(self.vision.shape) != shape:
                raise ValueError(f"mask: takes one entry per token, shape {shape}, got {tuple(self.vision.shape)}")
            return self.vision != 0
        if torch._C._current_graph_task_id() == -1:  # not inside backward
            raise RuntimeError(
                "MoCa: a decoder layer ran outside a forward pass of the model, so its vision tokens are not known; "
                "run the model that add_moca was given, or use vision_tokens"
            )
        self._replayed = True
        masks = [mask for mask in self._replayable if tuple(mask.shape) == shape]
        if not masks or not all(torch.equal(masks[0], mask) for mask in masks[1:]):
            raise RuntimeError(
                "MoCa: a checkpoint around whole decoder layers is recomputed after several forward passes and does "
                "not say which; run backward after each pass, or use the model's own gradient checkpointing"
            )
        return masks[0]


def unmoved_by(dtype: torch.dtype) -> str:
    """What is lost where scale and shift have `dtype`, of 16 bits."""
    step = torch.finfo(dtype).eps / 4  # half the distance to the next number below 1
    return f"in {str(dtype).removeprefix('torch.')} a scale of 1 stays 1 under steps smaller than {step:.1g}"


def is_calibrated(module: nn.Module) -> bool:
    """Whether `module` is a decoder layer with MoCa."""
    return HELD_AS in module.__dict__


def calibration_of(layer: nn.Module) -> Calibration:
    """The calibration that a decoder layer with MoCa holds."""
    return layer.__dict__[HELD_AS]


def _needed_by_other_processes(moca: nn.Module) -> bool:
    """Whether other processes wait for this one to use the layer's MoCa: to gather its shards, or its gradients."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_world_size() == 1:
        return False
    parameters = list(moca.parameters())
    # Sharded by itself: with the layer it is whole by now.
    sharded = hasattr(moca, "_fsdp_wrapped_module") or any(map(gathered_by_all, parameters))
    return sharded or (torch.is_grad_enabled() and any(p.requires_grad for p in parameters))


def _may_overwrite(state: Tensor, args: tuple[Any, ...]) -> bool:
    """Whether nobody else reads this layer output: it is no view, not the input, and autograd has not saved it."""
    if torch.compiler.is_compiling() or (args and state is args[0]) or state._is_view():
        return False
    if not torch.is_grad_enabled() or not state.requires_grad:
        return True
    # Neither the residual add keeps its result, nor a checkpoint around it.
    return state.grad_fn is not None and state.grad_fn.name() in ("AddBackward0", "CheckpointFunctionBackward")
