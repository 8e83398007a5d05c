"""A stand-in for the parts of torchvision that pytorch-fid imports: ToTensor, but no networks."""

from torchvision import models, transforms

__version__ = "0.0"
__all__ = ["models", "transforms"]
