"""The Triton kernels against float64: on a CUDA device, or in the interpreter if selected before import."""

import os

import pytest
import torch

from kernels.covariances import covariance
from tolerances import relative_error

pytest.importorskip("triton")

from mir_kernels.ops.sqrtm import eager, polar, sqrtm, triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# The accuracy of one product: float32 uses two float16 halves, 22 bits.
RESOLUTION = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-22}
STEP = (3.2, -2.4, 0.5)
# Odd and even sizes around the tile sizes: within one program's registers, in its cache, in several tiles.
SHAPES = [(3, 1, 1), (2, 7, 5), (2, 33, 33), (1, 64, 64), (1, 100, 70)]


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 2] if not INTERPRETED else [2])
def test_one_launch_does_what_its_steps_do(dtype, shape, steps):
    x = eager.normalize(random(*shape, dtype=torch.float64), dtype).contiguous()
    before = x.clone()
    exact, plain = x.double(), x
    for _ in range(steps):
        exact, plain = eager.polynomial_step(exact, STEP), eager.polynomial_step(plain, STEP)
    out = triton.small_polar(x, (STEP,) * steps)
    assert out.shape == shape
    assert torch.equal(x, before)
    assert relative_error(out, exact) <= 2 * (relative_error(plain, exact) + RESOLUTION[dtype])


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(2, 3, 9, 4), (4, 9), (0, 5, 5), (1, 37, 20) if INTERPRETED else (1, 130, 20)])
def test_polar_factor_of_every_shape(precision, shape, monkeypatch):
    if INTERPRETED:  # fewer tiles; the last shape is still too large for one program
        monkeypatch.setattr(triton, "SMALL", 32)
    m = random(*shape, dtype=torch.float32)
    if m.numel():
        w, s, vt = torch.linalg.svd(m, full_matrices=False)
        m = w * s.clamp(min=0.1)[..., None, :] @ vt
    u = polar(m, precision=precision, backend="triton")
    expected = polar(m.double(), precision="float64", backend="eager")
    torchs = relative_error(polar(m, precision=precision, backend="eager"), expected)
    assert relative_error(u, expected) <= 2 * torchs + {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}[precision]


def test_root_of_a_batch():
    a = torch.stack([covariance("i^-1", 24, seed) for seed in range(3)]).float().to(DEVICE)
    x = sqrtm(a, method="polar", backend="triton")
    assert relative_error(x @ x, a) <= 2e-6
