"""What pytorch-fid takes of torchvision when it is imported, and its ToTensor; its networks are not there."""

from torchvision import models, transforms

__version__ = "0.0"
__all__ = ["models", "transforms"]
