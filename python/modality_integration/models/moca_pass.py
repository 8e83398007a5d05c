"""What MoCa works out once in a forward pass, for all the layers that the pass goes through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.autograd.graph import Node

from mir_kernels.ops.moca import VisionMask


class FusedOutput(NamedTuple):
    """A layer's output h and the RMSNorm of it, which one operation gave, with all that must hold still until `norm`
    is called: the versions of both tensors that it reads, h's place in the graph, and whether autograd records."""

    h: Tensor
    normed: Tensor
    norm: nn.Module
    h_version: int
    weight_version: int
    grad_fn: Node | None
    recording: bool


@dataclass
class MoCaPass:
    """MoCa in one forward pass.

    vision: (B, T) bool, True at the vision tokens; None until the first layer asks, and on the device of the layer that
    asked last. idle: no token of the pass is a vision token (never so under torch.compile, which does not look).
    shared: `vision` as all the layers of the pass share it, if one has asked.
    fused: the output of the layer that ran last, while the norm that reads it has not been called.
    """

    vision: Tensor | None = None
    idle: bool = False
    shared: VisionMask | None = None
    fused: FusedOutput | None = None

    def mask_for(self, state: Tensor) -> Tensor:
        """`vision` where `state` lies."""
        assert self.vision is not None  # the first layer has asked
        if self.vision.device != state.device:
            self.vision, self.shared = self.vision.to(state.device), None
        return self.vision

    def shared_mask(self) -> VisionMask:
        """`vision`, whose rows are counted once for all layers on one device."""
        assert self.vision is not None
        if self.shared is None:
            self.shared = VisionMask(self.vision)
        return self.shared

    def take_fused(self) -> FusedOutput | None:
        """`fused`, which serves one call: whichever norm is called first takes it away."""
        fused, self.fused = self.fused, None
        return fused

    def has_calibrated(self, state: Tensor) -> bool:
        """Whether MoCa is in `state`, a layer's output, already."""
        return self.fused is not None and self.fused.h is state
