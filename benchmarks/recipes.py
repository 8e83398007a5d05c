"""Rival methods for the trace of a root, and the synthetic hidden states of the benchmarks.

Each method returns Tr((AB)^(1/2)) (...) of covariances (..., d, d).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class HiddenStates:
    """Generates samples one at a time: power-law spectra, a large mean in a few columns, a massive first token.

    vision, text: (1 + vision + text,) bool masks; the first token is neither.
    """

    def __init__(self, layers: int, hidden: int, vision: int, text: int, device: str = "cpu") -> None:
        self._generator = torch.Generator(device).manual_seed(0)  # a GPU generates gigabytes per second
        self._device = device
        masks = torch.zeros(2, 1 + vision + text, dtype=torch.bool)
        masks[0, 1 : 1 + vision] = True
        masks[1, 1 + vision :] = True
        self.vision, self.text = masks.to(device)
        self._spectrum = torch.arange(1, hidden + 1, device=device) ** -0.75
        self._means = torch.zeros(hidden, device=device)
        self._means[:: max(1, hidden // 4)] = 20.0
        self._gaps = torch.randn(layers, hidden, generator=self._generator, device=device) * self._spectrum

    def sample(self) -> list[Tensor]:
        """The states of every layer, (tokens, d) bfloat16 each."""
        return list(self._layers())

    def _layers(self) -> Iterator[Tensor]:
        for gap in self._gaps:
            x = torch.randn(len(self.vision), len(gap), generator=self._generator, device=self._device)
            x = x.add_(self._means).mul_(self._spectrum)
            x[self.vision] = x[self.vision].roll(1, -1) + gap
            x[0] *= 300  # an attention sink, as in real decoders
            yield x.bfloat16()


def eigh_trace(a: Tensor, b: Tensor) -> Tensor:
    """sqrt of the eigenvalues of A^(1/2) B A^(1/2), the root by eigenvectors, in the inputs' dtype."""
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt()[..., None, :] @ vectors.mT
    return torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum(-1)


def torchmetrics_trace(a: Tensor, b: Tensor) -> Tensor:
    """torchmetrics' FID: the real parts of the square roots of the eigenvalues of AB, a nonsymmetric matrix."""
    return torch.linalg.eigvals(a @ b).sqrt().real.sum(-1)


def published_accurate_trace(a: Tensor, b: Tensor) -> Tensor:
    """The published accurate mode: scipy.linalg.sqrtm of the float32 product, real part, trace."""
    import scipy.linalg

    product = (a.float() @ b.float()).cpu().numpy()
    roots = [scipy.linalg.sqrtm(p).real.trace() for p in product.reshape(-1, *product.shape[-2:])]
    return torch.tensor(roots, dtype=torch.float64).reshape(a.shape[:-2])


def published_fast_trace(a: Tensor, b: Tensor, iterations: int = 10) -> Tensor:
    """The published fast mode: Y <- (Y + Z^-1 AB)/2, Z <- (Z + Y^-1 AB)/2 from Y = AB, Z = I, in float32."""
    product = a.float() @ b.float()
    y, z = product, torch.eye(a.shape[-1], device=a.device).expand_as(product)
    for _ in range(iterations):
        y, z = (y + torch.linalg.solve(z, product)) / 2, (z + torch.linalg.solve(y, product)) / 2
    return y.diagonal(dim1=-2, dim2=-1).sum(-1)


def coupled_newton_schulz_trace(a: Tensor, b: Tensor, iterations: int = 20) -> Tensor:
    """The common fast method: coupled Newton-Schulz on the product, scaled by its Frobenius norm, in float32."""
    product = (a @ b).float()
    scale = torch.linalg.matrix_norm(product)[..., None, None]
    eye = torch.eye(a.shape[-1], device=a.device)
    y, z = product / scale, eye.expand_as(product)
    for _ in range(iterations):
        t = 1.5 * eye - 0.5 * z @ y
        y, z = y @ t, t @ z
    return (y * scale.sqrt()).diagonal(dim1=-2, dim2=-1).sum(-1)
