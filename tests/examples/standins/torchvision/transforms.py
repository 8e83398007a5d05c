"""ToTensor."""

import numpy as np
import torch


class ToTensor:
    """A picture as (3, height, width) in 0 ... 1."""

    def __call__(self, image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
