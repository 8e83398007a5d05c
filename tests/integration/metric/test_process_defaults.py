"""No result, state or file of the metric depends on process-wide torch defaults."""

import pytest
import torch
from safetensors import safe_open

from kernels.process_defaults import DEFAULTS
from modality_integration import ModalityIntegrationRate, mir

GENERATOR = torch.Generator("cpu").manual_seed(0)
D = 8


def draw(*shape):
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float32, device="cpu")


VISION = torch.arange(60, dtype=torch.int64, device="cpu").view(1, 60).expand(4, 60) < 25
BATCHES = [[draw(4, 60, D) + 0.3 * VISION[..., None] for _ in range(2)] for _ in range(3)]
BATCHES[1][0][2, 30] = 1e3  # an attention sink


def streamed(path, **options):
    metric = ModalityIntegrationRate(hold=20, groups=2, **options)
    for batch in BATCHES[:2]:
        metric.update(batch, VISION, ~VISION)
    metric.save(path)
    other = ModalityIntegrationRate.from_file(path)
    other.update(BATCHES[2], VISION, ~VISION)
    result = other.compute()
    metric.merge_state(other)
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
        about = sorted(file.metadata().items())
    numbers = {key: (value.dtype, value.tolist()) for key, value in tensors.items()}
    return [result.to_json(), metric.compute().to_json(), numbers, about]


def in_memory(path):
    vision, text = ([torch.cat([b[k][mask] for b in BATCHES]) for k in range(2)] for mask in (VISION, ~VISION))
    return [mir(vision, text, bounds=True, outliers=rule).to_json() for rule in ("remove", "median", "none")]


WAYS = {
    "streamed": streamed,
    "streamed, exact, announced": lambda path: streamed(path, precision="exact", samples=24, bounds=True),
    "in memory": in_memory,
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("way", WAYS)
def test_what_the_process_has_set_changes_nothing(way, default, tmp_path):
    wanted = WAYS[way](tmp_path / "before")
    with DEFAULTS[default]():
        found = WAYS[way](tmp_path / "inside")
        loaded = None if way == "in memory" else ModalityIntegrationRate.from_file(tmp_path / "before").compute()
    assert found == wanted
    if loaded is not None:
        assert loaded.to_json() == ModalityIntegrationRate.from_file(tmp_path / "inside").compute().to_json()
