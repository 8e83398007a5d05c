"""tests/aot.py compiles the same source, types, constants and options as a launch on that GPU."""

import pytest
import torch

pytest.importorskip("triton")

from triton.compiler import ASTSource
from triton.runtime import driver, jit
from triton.tools.tensor_descriptor import TensorDescriptor

import aot
from mir_kernels.ops.moca import triton as moca
from mir_kernels.ops.moments import packed
from mir_kernels.ops.moments import triton as moments
from mir_kernels.ops.sqrtm import triton as sqrtm
from mir_kernels.ops.sqrtm import triton_products as products


class Memory:
    """A tensor as torch allocates it on a GPU; only its dtype and address are used."""

    def __init__(self, dtype):
        self.dtype = dtype

    def data_ptr(self):
        return 0x7F0000000200


def allocated(argument):
    """An argument of a recorded launch as it would be on a GPU."""
    if isinstance(argument, TensorDescriptor):
        return TensorDescriptor(Memory(argument.base.dtype), *(argument.shape, argument.strides, argument.block_shape))
    return Memory(argument.dtype) if isinstance(argument, torch.Tensor) else argument


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def calls(rows, d):
    x, vector = empty(rows, d), empty(d, dtype=torch.float32)
    mask, rstd = empty(rows, dtype=torch.bool), empty(rows, dtype=torch.float32)
    wide = {"dtype": torch.float64}
    second = (empty(packed.entries(d), **wide), x, mask, empty(d, **wide), empty(2, d, **wide), empty(2, **wide))
    return [
        (moca.forward, (x, vector, vector, mask, empty(rows, d))),
        (moca.backward, (x, x, vector, mask, x)),
        (moca.add_rms_backward, (x, x, x, x, x, vector, mask, vector, rstd, x)),
        (moments.token_norms, (x,)),
        (moments.accumulate, (*second, "auto")),
        *(
            (products.polynomial_step, (empty(parts, 2, 64, 128, dtype=dtype), (3.2, -2.4, 0.5), tiles))
            for dtype, parts, tiles in (
                (torch.bfloat16, 1, products.TABLE[torch.bfloat16]["sm_90"]),
                (torch.float16, 2, products.TABLE_BELOW[torch.float32]["sm_90"]),
            )
        ),
        (sqrtm.small_polar, (empty(2, 60, 60), ((3.2, -2.4, 0.5),))),
    ]


@pytest.mark.skipif(not hasattr(jit.JITFunction, "_do_compile"), reason="this Triton has no _do_compile to intercept")
@pytest.mark.parametrize(("rows", "d"), [(64, 256), (1, 577), (37, 4097)])
def test_a_recorded_launch_has_the_cache_key_of_the_launch_itself(rows, d, monkeypatch):
    """Launches are recorded on tensors without memory; a launch on GPU tensors finds the kernel in the cache."""
    keys = []

    def compiled(kernel, _, signature, device, constexprs, options, attrs, warmup):
        keys.append((ASTSource(kernel, signature, constexprs, attrs).hash(), options.hash()))

    launches = [launch for launcher, given in calls(rows, d) for launch in aot.record(launcher, *given, target="sm_90")]
    assert len(launches) >= 12
    monkeypatch.setattr(driver, aot.ACTIVE, aot._Device("sm_90"))
    monkeypatch.setattr(jit.JITFunction, "_do_compile", compiled)
    monkeypatch.setattr(aot._Device, "get_current_device", lambda self: rows)  # a device without compiled kernels
    for launch in launches:
        keys.clear()
        with pytest.raises(AttributeError):  # nothing was compiled
            aot.compile_launch("sm_90", launch)
        launch.kernel.run(*(allocated(a) for a in launch.arguments), grid=launch.grid, warmup=True, **launch.keywords)
        assert keys[0] == keys[1], launch.kernel.__name__
