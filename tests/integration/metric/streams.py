"""Hidden states of a few samples, the metric fed with them, and `mir` of all of them together."""

import pytest
import torch

from modality_integration import ModalityIntegrationRate, mir

LAYERS, D = 3, 24


def sample(seed, *, tokens=40, batch=2, dtype=torch.float32, scale=1.0):
    """Hidden states (B, T, d) of LAYERS layers with heavy-tailed norms, and the two masks; some tokens in neither."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(0.5 * torch.randn(batch, tokens, 1, generator=generator)) * scale
    role = torch.rand(batch, tokens, generator=generator)
    vision, text = role < 0.55, role > 0.65
    hidden = []
    for k in range(LAYERS):
        states = torch.randn(batch, tokens, D, generator=generator) * size * torch.arange(1, D + 1) ** -0.5
        hidden.append((states * (k + 1) + vision[..., None] * 0.5).to(dtype))
    return hidden, vision, text


def whole(samples, **options):
    """mir() of all samples' tokens at once."""
    layers = range(LAYERS)
    vision = [torch.cat([hidden[k][v] for hidden, v, _ in samples]) for k in layers]
    text = [torch.cat([hidden[k][t] for hidden, _, t in samples]) for k in layers]
    return mir(vision, text, **options)


def fed(samples, /, **options):
    metric = ModalityIntegrationRate(**options)
    for one in samples:
        metric.update(*one)
    return metric


def assert_same(result, expected, tolerance=1e-9):
    assert result.per_layer == pytest.approx(expected.per_layer, rel=tolerance)
    assert result.alpha == pytest.approx(expected.alpha, rel=1e-12)
    assert result.kept == expected.kept
    assert result.removed == expected.removed
