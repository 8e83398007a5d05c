"""An update must not affect torch's process-wide settings or autograd, and must not wait for the device."""

import copy
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mir_kernels.ops.moments import StreamingMoments

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def matmul_precision():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def test_the_process_settings_do_not_reach_the_products(run, matmul_precision, assert_moments):
    x = torch.randn(2000, 50, device=run.device)
    matmul_precision("medium")
    moments = StreamingMoments(50, device=run.device, backend=run.backend)
    with torch.autocast(run.device, dtype=torch.bfloat16):
        moments.update(x[:1500])
    assert torch.get_float32_matmul_precision() == "medium"
    with torch.inference_mode():
        moments.update(x[1500:1600])
        inside = StreamingMoments(50, device=run.device, backend=run.backend)
        inside.update(x[:300])
    inside.update(x[300:].clone().requires_grad_())
    moments.update(x[1600:].clone().requires_grad_())
    assert_moments(moments, x)
    assert_moments(inside, x)
    assert not moments.covariance().requires_grad


@pytest.mark.parametrize("rows", [5, 40])
def test_an_update_never_asks_the_device_for_a_number(rows, small_blocks):
    """Meta tensors use the same code as CUDA and have no values, so every attempt to read one raises."""
    moments = StreamingMoments(8, device="meta")
    for masked, dtype in itertools.product((False, True), DTYPES):
        x = torch.zeros(3, rows, 8, dtype=dtype, device="meta").transpose(0, 1)
        mask = torch.zeros(rows, 3, dtype=torch.bool, device="meta") if masked else None
        for _ in range(3):
            moments.update(x, mask)
    moments.merge(copy.deepcopy(moments))
    assert moments.mean.shape == (8,)
    with pytest.raises(RuntimeError, match="meta"):
        int(moments.count)


class Operations(TorchDispatchMode):
    """Counts torch operations except views; each is a launch on a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += not (function.is_view or "empty" in function.name())
        return function(*arguments, **(keywords or {}))


def test_gathering_rows_without_a_mask_takes_two_operations():
    moments = StreamingMoments(8, device="meta")
    x = torch.zeros(576, 8, device="meta")
    moments.update(x)
    for masked, most in ((False, 2), (True, 9)):
        with Operations() as operations:
            moments.update(x, torch.zeros(576, dtype=torch.bool, device="meta") if masked else None)
        assert 0 < operations.count <= most + masked  # one more for the mask


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_an_update_does_not_synchronise(backend, assert_moments):
    x = torch.randn(9000, 300, device="cuda").bfloat16()
    mask = torch.rand(9000, device="cuda") < 0.7
    moments = StreamingMoments(300, device="cuda", backend=backend)
    moments.update(x[:5000], mask[:5000])  # compiles
    moments.update(x[5000:])
    moments.reset()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for part, keep in zip(x.split(576), mask.split(576), strict=True):
            moments.update(part, keep)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_moments(moments, x[mask])
