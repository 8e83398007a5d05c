"""Errors of moca and add_moca_rms_norm name the argument and the reason, and are raised before anything changes."""

import copy

import pytest
import torch
from torch.autograd import forward_ad

from kernels.moca.calls import vectors
from mir_kernels.ops.moca import add_moca_rms_norm, moca

BAD = [
    ("x", lambda t: t["x"].tolist(), TypeError, r"x: expected a torch\.Tensor.*, got list"),
    ("x", lambda t: t["x"].int(), TypeError, "x: expected one of the dtypes .* got int32"),
    ("x", lambda t: torch.tensor(1.0), ValueError, r"x: expected shape \(\.\.\., d\)"),
    ("x", lambda t: torch.empty(3, 0), ValueError, r"x: expected shape \(\.\.\., d\) with d >= 1"),
    ("scale", lambda t: t["scale"][1:], ValueError, r"scale: expected shape \(16,\), got \(15,\)"),
    ("scale", lambda t: t["scale"].long(), TypeError, "scale: expected one of the dtypes .* got int64"),
    ("shift", lambda t: t["shift"][None], ValueError, r"shift: expected shape \(16,\), got \(1, 16\)"),
    ("shift", lambda t: t["shift"].to("meta"), ValueError, "shift: is on meta, but x is on cpu"),
    ("mask", lambda t: t["mask"][:1], ValueError, r"mask: expected one entry per token, shape \(2, 9\), got \(1, 9\)"),
    ("mask", lambda t: t["mask"][..., None], ValueError, r"mask: .* got \(2, 9, 1\)"),
    ("mask", lambda t: t["mask"].long() + 1, ValueError, "mask: expected True and False, or 0 and 1, got 2 .*int64"),
    ("mask", lambda t: t["mask"].to(torch.complex64), TypeError, "mask: expected one of the dtypes .* got complex64"),
    ("residual", lambda t: t["residual"][:1], ValueError, r"residual: expected x's .* dtype, \(2, 9, 16\) float32"),
    ("residual", lambda t: t["residual"].bfloat16(), ValueError, "residual: .* bfloat16"),
    ("weight", lambda t: t["weight"][1:], ValueError, r"weight: expected shape \(16,\), got \(15,\)"),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), BAD)
def test_bad_input_is_refused_by_name_and_nothing_changes(t, name, change, error, message):
    t[name] = change(t)
    before = copy.deepcopy(t)
    if name not in ("residual", "weight"):
        with pytest.raises(error, match=message):
            moca(t["x"], *vectors(t), inplace=True)
    if name not in ("x",):
        with pytest.raises(error, match=message):
            add_moca_rms_norm(t["x"], t["residual"], *vectors(t), t["weight"])
    assert all(t[n] == v if isinstance(v, list) else v.is_meta or torch.equal(t[n], v) for n, v in before.items())


@pytest.mark.parametrize("name", ["x", "scale", "mask"])
def test_sparse_tensors_are_refused_by_name(t, name):
    t[name] = t[name].detach().to_sparse()
    with pytest.raises(TypeError, match=f"{name}: expected a dense tensor, got torch.sparse_coo"):
        moca(t["x"], *vectors(t))


def test_a_second_derivative_is_refused(t):
    x = t["x"].requires_grad_()
    (dx,) = torch.autograd.grad(moca(x, *vectors(t)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("operation", ["moca", "add_moca_rms_norm"])
def test_a_second_derivative_of_the_registered_operation_is_refused(t, operation):
    x = t["x"].requires_grad_()
    scale, shift, mask = t["scale"].requires_grad_(), t["shift"], t["mask"]
    if operation == "moca":
        out = torch.ops.mir_kernels.moca(x, scale, shift, mask, None)
    else:
        out, *_ = torch.ops.mir_kernels.add_moca_rms_norm(x, t["residual"], scale, shift, mask, t["weight"], 1e-6, None)
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable at most once"):
        torch.autograd.grad(dx.sum(), x)


@pytest.mark.parametrize("grad", [False, True])
def test_torch_func_and_forward_mode_are_refused_with_a_reason(t, grad):
    x, scale, shift, mask = t["x"], t["scale"].requires_grad_(grad), t["shift"], t["mask"]
    refused = pytest.raises(RuntimeError, match=r"^moca: torch.func transforms .* not supported")
    with refused:
        torch.vmap(lambda x, m: moca(x, scale, shift, m))(x, mask)
    with refused:
        torch.vmap(lambda s: moca(x, s, shift, mask))(torch.stack([scale, scale]))
    with refused:
        torch.vmap(lambda m: moca(x, scale, shift, m))(torch.stack([mask, ~mask]))
    with refused:
        torch.func.grad(lambda x: moca(x, scale, shift, mask).sum())(x)
    with refused:
        torch.func.jvp(lambda x: moca(x, scale, shift, mask), (x,), (x,))
    with forward_ad.dual_level(), refused:
        moca(forward_ad.make_dual(x, t["grad"]), scale, shift, mask)
    with pytest.raises(RuntimeError, match=r"^add_moca_rms_norm: torch.func transforms .* not supported"):
        torch.vmap(lambda r: add_moca_rms_norm(x, r, scale, shift, mask, t["weight"]))(torch.stack([x, x]))
