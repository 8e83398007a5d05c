"""MoCa's state in one forward pass, computed once and shared by all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.autograd.graph import Node

from mir_kernels.ops.moca import VisionMask


class FusedOutput(NamedTuple):
    """A layer's output h and its RMSNorm, computed by one fused operation, with everything that must not change until
    `norm` is called: the versions of h and the weight, h's place in the graph, and whether autograd records."""

    h: Tensor
    normed: Tensor
    norm: nn.Module
    h_version: int
    weight_version: int
    grad_fn: Node | None
    recording: bool


@dataclass
class MoCaPass:
    """MoCa's state in one forward pass.

    vision: (B, T) bool, True at the vision tokens; None before the first layer needs it, then on the device of the
    layer that used it last. idle: no token of the pass is a vision token (not checked under torch.compile).
    shared: `vision` as a VisionMask shared by all layers, once one has needed it.
    fused: the fused output of the last layer, until the norm that reads it is called.
    """

    vision: Tensor | None = None
    idle: bool = False
    shared: VisionMask | None = None
    fused: FusedOutput | None = None

    def mask_for(self, state: Tensor) -> Tensor:
        """`vision` on the device of `state`."""
        assert self.vision is not None  # set by the first layer
        if self.vision.device != state.device:
            self.vision, self.shared = self.vision.to(state.device), None
        return self.vision

    def shared_mask(self) -> VisionMask:
        """`vision` as a VisionMask, whose rows are counted once for all layers on one device."""
        assert self.vision is not None
        if self.shared is None:
            self.shared = VisionMask(self.vision)
        return self.shared

    def take_fused(self) -> FusedOutput | None:
        """Returns `fused` and clears it: it serves only the norm that is called first."""
        fused, self.fused = self.fused, None
        return fused

    def has_calibrated(self, state: Tensor) -> bool:
        """Whether `state`, a layer's output, already includes MoCa."""
        return self.fused is not None and self.fused.h is state
