"""Swap this library's covariance and matrix square root into pytorch-fid and torchmetrics.

    pip install torchmetrics pytorch-fid
    python examples/frechet_backend.py

For each tool, prints the Fréchet distance between two sets of pictures and the time it takes, before and after the
swap. A tool that is not installed is skipped.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mir_kernels import StreamingMoments, frechet_distance

WIDTH, PICTURES, SIDE = 512, 200, 16


def swap_pytorch_fid(fid_score: Any) -> None:
    """Patch the module `pytorch_fid.fid_score`, so that its command and functions compute with this library."""

    def statistics(
        files: Any, model: Any, batch_size: int = 50, dims: int = 2048, device: str = "cpu", num_workers: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        moments = StreamingMoments(dims, precision="exact")  # also works with fewer pictures than features
        moments.update(torch.as_tensor(fid_score.get_activations(files, model, batch_size, dims, device, num_workers)))
        return moments.mean.numpy(), moments.covariance().numpy()

    def distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray, eps: float = 0.0) -> float:
        return frechet_distance(*map(torch.as_tensor, (mu1, sigma1, mu2, sigma2))).item()

    fid_score.calculate_activation_statistics, fid_score.calculate_frechet_distance = statistics, distance


def swap_torchmetrics(fid: Any) -> None:
    """Patch `torchmetrics.image.fid` to use this covariance, instead of sums of squares, and this root."""
    kind = fid.FrechetInceptionDistance
    reset_sums = kind.reset

    def update(self: Any, imgs: Tensor, real: bool) -> None:
        features = self.inception(imgs)
        fresh = {side: StreamingMoments(features.shape[1], precision="exact") for side in (True, False)}
        self.__dict__.setdefault("moments", fresh)[real].update(features)

    def compute(self: Any) -> Tensor:
        real, fake = self.moments[True], self.moments[False]
        return frechet_distance(real.mean, real.covariance(), fake.mean, fake.covariance())

    def reset(self: Any) -> None:
        self.__dict__.pop("moments", None)
        reset_sums(self)

    kind.update, kind.compute, kind.reset = update, compute, reset


class Features(nn.Module):
    """Random features of small pictures, in place of Inception, which would have to be downloaded."""

    num_features = WIDTH

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(3 * SIDE * SIDE, WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        return self.project(images.flatten(1)).relu()


def pictures(seed: int) -> Tensor:
    """Noise with a random tint per seed, (PICTURES, 3, SIDE, SIDE) in 0 ... 1."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(PICTURES, 3, SIDE, SIDE, generator=generator)
    return (0.7 * noise + 0.3 * torch.rand(1, 3, 1, 1, generator=generator)).mul(255).round() / 255


def by_torchmetrics(fid: Any, sets: list[Tensor]) -> float:
    """The distance from torchmetrics."""
    metric = fid.FrechetInceptionDistance(feature=Features())
    for real, images in zip((True, False), sets, strict=True):
        for batch in images.split(50):
            with torch.no_grad():
                metric.update(batch, real=real)
    return metric.compute().item()


def by_pytorch_fid(fid_score: Any, sets: list[Tensor]) -> float:
    """The distance from pytorch-fid, which reads pictures from files."""

    class Pooled(Features):
        def forward(self, images: Tensor) -> Any:
            return [super().forward(images)[:, :, None, None]]

    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, images in zip(("real", "fake"), sets, strict=True):
            files = [Path(folder, f"{name}{i}.png") for i in range(len(images))]
            for file, image in zip(files, images, strict=True):
                Image.fromarray(image.mul(255).byte().permute(1, 2, 0).numpy()).save(file)
            found += fid_score.calculate_activation_statistics(files, Pooled(), 50, WIDTH, "cpu", 0)
    return float(fid_score.calculate_frechet_distance(*found))


def timed(measure: Callable[[Any, list[Tensor]], float], module: Any, sets: list[Tensor]) -> tuple[float, float]:
    """The value, and the shortest time of three runs in seconds."""
    seconds, value = [], 0.0
    for _ in range(3):
        start = time.perf_counter()
        value = measure(module, sets)
        seconds.append(time.perf_counter() - start)
    return value, min(seconds)


def main() -> None:
    """Run each tool before and after the swap."""
    sets = [pictures(seed) for seed in (1, 2)]
    for name, measure, swap in (
        ("torchmetrics.image.fid", by_torchmetrics, swap_torchmetrics),
        ("pytorch_fid.fid_score", by_pytorch_fid, swap_pytorch_fid),
    ):
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            print(f"{name}: skipped ({error})")
            continue
        own, before = timed(measure, module, sets)
        swap(module)
        ours, after = timed(measure, module, sets)
        print(f"{name}: {own:.6f} in {before:.3f} s, after the swap {ours:.6f} in {after:.3f} s")


if __name__ == "__main__":
    main()
