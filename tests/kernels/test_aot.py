"""What tests/aot.py compiles is what a launch on that GPU would: the same source, types, constants and options."""

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import driver, jit

import aot
from mir_kernels.ops.moca import triton as moca
from mir_kernels.ops.moments import packed
from mir_kernels.ops.moments import triton as moments
from mir_kernels.ops.sqrtm import triton as sqrtm


class Driver:
    """Stands in for a machine with an H100."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


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
        (sqrtm.polynomial_step, (empty(2, d, d), (3.2, -2.4, 0.5))),
        (sqrtm.small_polar, (empty(2, 60, 60), ((3.2, -2.4, 0.5),))),
    ]


@pytest.mark.parametrize(("rows", "d"), [(64, 256), (1, 577), (37, 4097)])
def test_a_recorded_launch_has_the_cache_key_of_the_launch_itself(rows, d, monkeypatch):
    keys = []

    def key(source, backend, options):
        return source.hash(), backend.hash(), options.hash()

    def launched(kernel, _, signature, device, constexprs, options, attrs, warmup):
        keys.append(key(ASTSource(kernel, signature, constexprs, attrs), backend, options))

    def compiled(source, target, options):
        keys.append(key(source, make_backend(target), make_backend(target).parse_options(dict(options))))
        raise StopIteration

    backend = make_backend(Driver().get_current_target())
    launches = [launch for launcher, given in calls(rows, d) for launch in aot.record(launcher, *given, target="sm_90")]
    assert len(launches) >= 12
    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(jit.JITFunction, "_do_compile", launched)
    monkeypatch.setattr(triton, "compile", compiled)
    for launch in launches:
        keys.clear()
        given = [a.dtype if isinstance(a, torch.Tensor) else a for a in launch.arguments]
        launch.kernel.warmup(*given, grid=launch.grid, **launch.keywords)
        with pytest.raises(StopIteration):
            aot.compile_launch("sm_90", launch)
        assert keys[0] == keys[1], launch.kernel.__name__
