"""The backends of moca and add_moca_rms_norm: their names, errors of those that cannot run, and the reference."""

import pytest
import torch

from kernels.moca.calls import D, vectors
from mir_kernels.ops.moca import OPERATIONS, add_moca_rms_norm, moca


def test_backends_that_do_not_exist_or_cannot_run_say_so(t):
    with pytest.raises(ValueError, match="backend: moca has no backend 'fast'"):
        moca(t["x"], *vectors(t), backend="fast")
    with pytest.raises(RuntimeError, match="backend 'cuda' of moca cannot run on cpu"):
        moca(t["x"], *vectors(t), backend="cuda")
    with pytest.raises(RuntimeError, match=r"set TRITON_INTERPRET=1|triton is not installed"):
        moca(t["x"], *vectors(t), backend="triton")
    with pytest.raises(ValueError, match="backend: add_moca_rms_norm has no backend 'fast'"):
        add_moca_rms_norm(t["x"], t["residual"], *vectors(t), t["weight"], backend="fast")


def test_every_backend_of_a_device_is_listed_once():
    for operation in OPERATIONS:
        for order in operation.orders.values():
            assert len(set(order)) == len(order)
            assert order[-1] == "eager"
    assert {o.name for o in OPERATIONS} == {"moca", "add_moca_rms_norm"}


def test_reference_backend_is_the_formula(t):
    x, scale, chosen = t["x"].double(), t["scale"].double(), t["mask"][..., None]
    exact = torch.where(chosen, scale * x + t["shift"].double(), x)
    assert torch.equal(moca(t["x"], *vectors(t), backend="reference"), exact.float())
    leaves = [t["x"].requires_grad_(), t["scale"].requires_grad_()]
    out = moca(*leaves, t["shift"], t["mask"], backend="reference")
    _, dscale = torch.autograd.grad(out, leaves, t["grad"])
    torch.testing.assert_close(dscale, (t["grad"].double() * chosen * x).sum((0, 1)).float())
    with torch.no_grad():
        normed, h = add_moca_rms_norm(t["x"], t["residual"], *vectors(t), t["weight"], backend="reference")
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(h, (D,), t["weight"], 1e-6))
