"""The large products against float64, in every way listed in the tables: on a CUDA device or in the interpreter."""

import os

import pytest
import torch

from tolerances import relative_error

pytest.importorskip("triton")

import triton
import triton.language as tl

from mir_kernels import _triton
from mir_kernels.ops.sqrtm import eager
from mir_kernels.ops.sqrtm import triton_products as products
from mir_kernels.ops.sqrtm.triton_products import Tiles
from mir_kernels.ops.sqrtm.triton_tiles import tile

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
COPY_ENGINE = INTERPRETED or not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (9, 0)
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# The accuracy of one product: float32 uses two float16 halves, 22 bits.
RESOLUTION = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-22}
STEP = (3.2, -2.4, 0.5)


def ways():
    """(dtype, tiles): every way of multiplying, by pointers with square tiles, by descriptors with wide ones."""
    found = {}
    for descriptors in (False, True) if COPY_ENGINE else (False,):
        for halves in ("none", "together", "in turn", "chained"):
            shape = ((32, 64) if descriptors else (32, 32)) if INTERPRETED else ((64, 128) if descriptors else (64, 64))
            tiles = Tiles(*shape, 32, 4, 1 if INTERPRETED else 3, halves, descriptors, band=2)
            for dtype in (torch.float32,) if halves != "none" else (torch.bfloat16, torch.float16):
                found[f"{str(dtype)[6:]}-{halves}-{'descriptors' if descriptors else 'pointers'}"] = (dtype, tiles)
    return [pytest.param(*way, id=name) for name, way in found.items()]


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def shipped(x):
    return products.tiles_for(*x.shape[-2:], x.dtype, x.device)


def symmetric(x, tiles, *, transposed, add=None, **scales):
    """`symmetric_product` on matrices instead of planes."""
    planes = None if add is None else products.split(add, tiles)
    out = products.symmetric_product(products.split(x, tiles), tiles, transposed=transposed, add=planes, **scales)
    size = x.shape[-1] if transposed else x.shape[-2]
    return products.join(out, size, size)


def step(x, tiles):
    return products.join(products.polynomial_step(products.split(x, tiles), STEP, tiles), *x.shape[-2:])


@pytest.mark.parametrize(("dtype", "tiles"), ways())
@pytest.mark.parametrize("transposed", [False, True])
def test_symmetric_product_is_symmetric_and_right(dtype, tiles, transposed):
    for shape in ((1, 33, 70),) if INTERPRETED else ((2, 5, 5), (1, 33, 130), (3, 70, 31)):
        x = (random(*shape, dtype=torch.float32) / 4).to(dtype)
        wide = x.double().mT if transposed else x.double()
        add = (wide @ wide.mT).to(dtype)
        out = symmetric(x, tiles, transposed=transposed, add=add, alpha=0.5, beta=2.0)
        assert torch.equal(out, out.mT)
        exact = 0.5 * wide @ wide.mT + 2.0 * add.double()
        assert relative_error(out, exact) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("dtype", "tiles"), ways())
def test_fused_step_is_no_worse_than_plain_torch(dtype, tiles):
    for shape in ((2, 40, 33),) if INTERPRETED else ((2, 16, 16), (1, 48, 80), (2, 130, 33)):
        x = eager.normalize(random(*shape, dtype=torch.float64), dtype).contiguous()
        exact, torchs = eager.polynomial_step(x.double(), STEP), eager.polynomial_step(x, STEP)
        assert relative_error(step(x, tiles), exact) <= 2 * (relative_error(torchs, exact) + RESOLUTION[dtype])


@pytest.mark.parametrize(("dtype", "tiles"), ways())
def test_symmetric_product_of_small_integers_is_exact_in_every_tile(dtype, tiles):
    integers = torch.randint(-3, 4, (1, 70, 35), generator=torch.Generator().manual_seed(1))
    x = (integers / 16).to(dtype).to(DEVICE)
    for transposed, wide in ((False, x.float()), (True, x.float().mT)):
        assert torch.equal(symmetric(x, tiles, transposed=transposed), (wide @ wide.mT).to(dtype))


@pytest.mark.parametrize(("dtype", "tiles"), ways()[-2:] if INTERPRETED else ways())
def test_a_matrix_with_nan_spoils_no_other_of_its_batch(dtype, tiles):
    x = eager.normalize(random(3, 33, 33, dtype=torch.float64), dtype).contiguous()
    expected = step(x, tiles)
    x[1] = float("nan")
    found = step(x, tiles)
    assert torch.equal(found[::2], expected[::2])
    assert found[1].isnan().all()


@pytest.mark.parametrize("halves", ["together", "in turn", "chained"])
def test_float32_products_hold_the_bits_of_two_halves(halves):
    """Entries of a 4096^2 polar factor are near 0.016, and most of their products are smaller still."""
    tiles = Tiles(32, 32, 32, 4, 1, halves)
    for size in (0.5, 0.016, 1e-4):
        x = random(1, 64, 64, dtype=torch.float32) * size
        found = symmetric(x, tiles, transposed=True)
        wide = x.double()
        # The low half of a result below 2^-12 is subnormal, with a resolution of 2^-34.
        error = (found.double() - wide.mT @ wide).abs() - 2.0**-21 * (wide.mT.abs() @ wide.abs())
        assert error.max() <= 2.0**-35


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rows_that_are_shipped_multiply_right(dtype):
    for d in (130, products.LARGE) if not INTERPRETED else (40,):
        x = eager.normalize(random(1 if INTERPRETED else 2, d, d, dtype=torch.float64), dtype).contiguous()
        exact, torchs = eager.polynomial_step(x.double(), STEP), eager.polynomial_step(x, STEP)
        assert relative_error(step(x, shipped(x)), exact) <= 2 * (relative_error(torchs, exact) + RESOLUTION[dtype])


@triton.jit
def list_tiles(p_out, down, across, LOWER: tl.constexpr, BAND: tl.constexpr):
    t = tl.program_id(0)
    i, j = _triton.lower_tile(t, down, BAND) if LOWER else tile(t, down, across, BAND)
    tl.store(p_out + 2 * t, i)
    tl.store(p_out + 2 * t + 1, j)


@pytest.mark.parametrize("band", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("down", "across"), [(1, 1), (2, 5), (7, 3), (9, 9)] if INTERPRETED else [(1, 1), (2, 5), (7, 3), (9, 16), (17, 17)]
)
def test_every_tile_comes_once_and_in_bands(down, across, band):
    for lower in (False, True):
        wanted = [(i, j) for i in range(down) for j in range(across if not lower else i + 1)]
        out = torch.full((len(wanted), 2), -1, dtype=torch.int32, device=DEVICE)
        list_tiles[(len(wanted),)](out, down, across, LOWER=lower, BAND=band)
        found = [tuple(pair) for pair in out.tolist()]
        assert sorted(found) == wanted
        bands = [i // band for i, _ in found]
        assert bands == sorted(bands)
        for one in set(bands):  # column by column, so that each is read once for all rows of the band
            columns = [j for i, j in found if i // band == one and (not lower or j < one * band)]
            assert columns == sorted(columns)


@pytest.mark.gpu
def test_batch_offsets_pass_2_to_the_31():
    """(320, 2560, 3072): the batch offset of the last matrices does not fit 32 bits."""
    x = torch.zeros(1, 320, 2560, 3072, dtype=torch.bfloat16, device="cuda")
    x[0, -1] = torch.randn(2560, 3072, device="cuda") / 64
    eye = torch.eye(3072, dtype=torch.bfloat16, device="cuda").expand(1, 320, -1, -1).contiguous()
    out = products.product(x, eye, products.tiles_for(2560, 3072, x.dtype, x.device), beta=0)
    assert torch.equal(out[0, -1], x[0, -1])
    assert not out[0, :-1].any()
