"""The public functions on a side stream, on the second device, and beyond 2^31 elements. Needs a GPU."""

import pytest
import torch

from mir_kernels import StreamingMoments, add_moca_rms_norm, moca, polar, trace_sqrt_product

pytestmark = pytest.mark.gpu
STEP = (3.2, -2.4, 0.5)


def tensors(*shapes, seed=0, device="cuda"):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(device) for shape in shapes]


def moca_and_gradients(x, scale, shift):
    mask = torch.arange(len(x), device=x.device) % 3 != 1
    leaves = [t.clone().requires_grad_() for t in (x, scale, shift)]
    out = moca(*leaves, mask)
    return [out.detach(), *torch.autograd.grad((out * out.detach()).sum(), leaves)]


def fused_and_gradients(x, scale, shift):
    mask = torch.arange(len(x), device=x.device) % 3 != 1
    leaves = [t.clone().requires_grad_() for t in (x, x + 1, scale, shift, scale)]
    out, h = add_moca_rms_norm(leaves[0], leaves[1], leaves[2], leaves[3], mask, leaves[4])
    return [out.detach(), h.detach(), *torch.autograd.grad((out * out.detach()).sum() + h.sum(), leaves)]


def moments_of(x, scale, shift):
    found = StreamingMoments(x.shape[1], device=x.device)
    for part in (x * scale).chunk(3):
        found.update(part, torch.arange(len(part), device=x.device) % 3 != 1)
    return [found.mean, found.covariance()]


def traces_of(x, scale, shift):
    a, b = ((y.T @ y).double() for y in (x, x * scale + shift))
    return [trace_sqrt_product(a, b)]


def polar_of(x, scale, shift):
    return [polar((x[:256] * scale)[None], precision="float32")]


CALLS = [moca_and_gradients, fused_and_gradients, moments_of, traces_of, polar_of]
SHAPES = ((1500, 192), (192,), (192,))


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_public_operations_follow_the_current_stream(call):
    given = tensors(*SHAPES)
    expected = call(*given)
    late = [torch.zeros_like(tensor) for tensor in given]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # a kernel on any other stream would now read zeros
        for tensor, value in zip(late, given, strict=True):
            tensor.copy_(value)
        found = call(*late)
    stream.synchronize()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_public_operations_run_where_their_tensors_lie(call):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    expected = call(*tensors(*SHAPES))
    found = call(*tensors(*SHAPES, device="cuda:1"))
    assert torch.cuda.current_device() == 0
    for one, other in zip(found, expected, strict=True):
        assert one.device.index == 1
        torch.testing.assert_close(one.cpu(), other.cpu(), rtol=1e-5, atol=1e-5)


def need(gigabytes):
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory, {free:.1f} are")


@pytest.fixture
def roots():
    pytest.importorskip("triton")
    from mir_kernels.ops.sqrtm import triton

    return triton


@pytest.fixture
def products():
    pytest.importorskip("triton")
    from mir_kernels.ops.sqrtm import triton_products

    return triton_products


def test_a_batch_of_large_matrices_goes_beyond_2_to_the_31_elements(products):
    d, batch = 4096, 2**31 // 4096**2 + 1
    need(5 * batch * d * d * 2 / 1e9 + 1)  # X, G, Z, the result, and the reference
    x = torch.zeros(1, batch, d, d, dtype=torch.bfloat16, device="cuda")
    x[0, -1] = torch.randn(d, d, generator=torch.Generator("cuda").manual_seed(0), device="cuda") / (2 * d**0.5)
    tiles = products.tiles_for(d, d, x.dtype, x.device)
    one = x[:, -1:].clone()
    found = products.polynomial_step(x, STEP, tiles)
    assert torch.equal(found[:, -1:], products.polynomial_step(one, STEP, tiles))
    assert not found[:, :-1].any()
    del found
    last = products.symmetric_product(x, tiles, transposed=False)[:, -1:]
    assert torch.equal(last, products.symmetric_product(one, tiles, transposed=False))


def test_rows_of_one_matrix_beyond_2_to_the_31_elements_count(products):
    d, rows = products.ALIGN, 2**25 + 64
    need(5)
    x = torch.zeros(1, 1, rows, d, dtype=torch.bfloat16, device="cuda")
    last = torch.randint(-3, 4, (64, d), generator=torch.Generator("cuda").manual_seed(0), device="cuda").bfloat16()
    x[0, 0, -64:] = last
    found = products.symmetric_product(x, products.tiles_for(rows, d, x.dtype, x.device), transposed=True)
    assert torch.equal(found[0, 0].float(), (last.T @ last).float())


@pytest.mark.parametrize("d", [64, 128])  # in registers, and in the first-level cache
def test_a_batch_of_small_matrices_goes_beyond_2_to_the_31_elements(roots, d):
    batch = 2**31 // d**2 + 1
    need(6 * batch * d * d * 2 / 1e9 + 1)
    x = torch.zeros(batch, d, d, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.randn(d, d, generator=torch.Generator("cuda").manual_seed(0), device="cuda") / (2 * d**0.5)
    expected = roots.small_polar(x[-1:].clone(), (STEP,) * 2)
    found = roots.small_polar(x, (STEP,) * 2)
    assert torch.equal(found[-1:], expected)
    assert not found[:-1].any()
