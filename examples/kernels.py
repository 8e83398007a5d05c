"""The kernels without a model: covariances of two streams, their distance, and MoCa in a training step.

    python examples/kernels.py

All public names are typed: this file is checked with mypy in strict mode and with pyright.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mir_kernels import MoCa, StreamingMoments, backends, frechet_distance, sqrtm, trace_sqrt_product

D, TOKENS, BATCHES = 64, 4096, 8


def streamed(offset: float, generator: torch.Generator) -> StreamingMoments:
    """Mean and covariance of tokens that arrive in batches, in the memory of one batch."""
    moments = StreamingMoments(D)
    for _ in range(BATCHES):
        tokens = offset + torch.randn(TOKENS, D, generator=generator)
        counted = torch.rand(TOKENS, generator=generator) < 0.5
        moments.update(tokens, counted)
    return moments


def main() -> None:
    """Run each operation once."""
    generator = torch.Generator().manual_seed(0)
    vision, text = streamed(0.5, generator), streamed(0.0, generator)
    cov_vision, cov_text = vision.covariance(), text.covariance()
    print(f"{vision.count} and {text.count} tokens")

    root: Tensor = sqrtm(cov_vision)
    print(f"|S S - C| / |C| = {(root @ root - cov_vision).norm() / cov_vision.norm():.1e}")

    trace = trace_sqrt_product(cov_vision, cov_text, bounds=True)
    print(f"Tr((C1 C2)^(1/2)) = {trace.value:.6f}, certified between {trace.lower:.6f} and {trace.upper:.6f}")

    distance: Tensor = frechet_distance(vision.mean, cov_vision, text.mean, cov_text)
    print(f"Frechet distance {distance:.4f}; the limit for infinite streams is {D * 0.25}")

    moca = MoCa(D)
    optimizer = torch.optim.SGD(moca.parameters(), lr=0.5)
    hidden = torch.randn(4, 128, D, generator=generator) + 0.5
    is_vision = torch.arange(128).expand(4, -1) < 32
    loss = torch.zeros(())
    for _ in range(20):  # the shift learns to cancel the mean of the vision tokens
        optimizer.zero_grad()
        loss = moca(hidden, is_vision)[is_vision].mean(0).square().sum()
        loss.backward()
        optimizer.step()
    print(f"squared mean of the vision tokens after training: {loss.item():.1e}")
    print(backends())


if __name__ == "__main__":
    main()
