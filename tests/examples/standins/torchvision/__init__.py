"""A stand-in with what pytorch-fid imports from torchvision, including ToTensor but no networks."""

from torchvision import models, transforms

__version__ = "0.0"
__all__ = ["models", "transforms"]
