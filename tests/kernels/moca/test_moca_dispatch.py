"""moca and add_moca_rms_norm in torch's dispatcher: subclasses, odd views, traces, fake tensors, autocast."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from kernels.moca.calls import FORWARD, Wrapped, vectors
from mir_kernels.ops.moca import add_moca_rms_norm, moca


@pytest.mark.parametrize("name", ["x", "residual", "scale", "shift", "mask", "weight"])
def test_a_subclass_in_any_place_is_asked_and_not_read_behind_its_back(t, name):
    for operation, call in FORWARD.items():
        if operation == "moca" and name in ("residual", "weight"):
            continue
        Wrapped.seen = []
        found = call(t | {name: Wrapped(t[name])})
        assert f"mir_kernels::{operation}" in Wrapped.seen
        assert all(torch.equal(a, b) for a, b in zip(found, call(t), strict=True))


@pytest.mark.parametrize("name", ["x", "residual", "scale", "shift", "weight"])
def test_negative_views_are_read_as_the_numbers_they_are(t, name):
    for call in FORWARD.values():
        found, expected = call(t | {name: torch._neg_view(-t[name])}), call(t)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    x = torch._neg_view(-t["x"])
    assert torch.equal(moca(x, *vectors(t), inplace=True), moca(t["x"], *vectors(t)))


GRADIENTS = {
    "negative view": lambda g: (torch._neg_view(-g), g),
    "zeros without memory": lambda g: (torch._efficientzerotensor(g.shape), torch.zeros_like(g)),
    "subclass": lambda g: (Wrapped(g), g),
}


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_gradients_without_an_address_of_their_own_are_read_right(t, kind, inplace):
    Wrapped.seen = []
    leaves = x, scale = t["x"].requires_grad_(), t["scale"].requires_grad_()
    outputs = [moca(x * 1, scale, t["shift"], t["mask"], inplace=inplace), *FORWARD["add_moca_rms_norm"](t)]
    for out in outputs:
        found, expected = (torch.autograd.grad(out, leaves, g, retain_graph=True) for g in GRADIENTS[kind](t["grad"]))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("operation", FORWARD)
def test_whoever_traces_or_listens_sees_the_registered_operation(t, operation):
    call, names = FORWARD[operation], list(t)
    others = {n: v + 1 if n != "mask" else ~v for n, v in t.items()}

    def run(*tensors):
        return call(dict(zip(names, tensors, strict=True)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and does not record some checks
        scripted = torch.jit.trace(run, tuple(t.values()), check_trace=False)
    graph = make_fx(run)(*t.values())
    for traced in (scripted, graph):
        assert all(torch.equal(a, b) for a, b in zip(traced(*others.values()), call(others), strict=True))


def test_operations_pass_opcheck(t):
    ops, v = torch.ops.mir_kernels, vectors(t)
    leaves = [t[n].clone().requires_grad_() for n in ("x", "scale", "shift", "residual", "weight")]
    x, scale, shift, residual, weight = leaves
    rstd = torch.rand(2, 9)
    for backend in ("eager", None):
        torch.library.opcheck(ops.moca, (x, scale, shift, t["mask"], backend))
        torch.library.opcheck(ops.moca, (t["x"].bfloat16().transpose(0, 1), *v[:2], t["mask"].t().float(), backend))
        torch.library.opcheck(ops.moca_backward, (t["grad"], t["x"], t["scale"], t["mask"], backend))
        fused = (x, residual, scale, shift, t["mask"], weight, 1e-6, backend)
        found = torch.library.opcheck(ops.add_moca_rms_norm, fused)
        assert set(found.values()) == {"SUCCESS"}
        saved = (t["residual"], t["x"], t["residual"], t["scale"], t["mask"], t["weight"], rstd, backend)
        for grad_h in (t["grad"], None):
            torch.library.opcheck(ops.add_moca_rms_norm_backward, (t["grad"], grad_h, *saved))


def test_fake_tensors_go_through_the_registered_operation(t):
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = {n: mode.from_tensor(v) for n, v in t.items()}
        out = moca(fake["x"], *vectors(fake))
        normed, h = add_moca_rms_norm(fake["x"], fake["residual"], *vectors(fake), fake["weight"])
    assert out.shape == normed.shape == h.shape == t["x"].shape
    assert type(out) is type(fake["x"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(t, dtype):
    x, residual = t["x"].to(dtype), t["residual"].to(dtype)
    plain = moca(x, *vectors(t)), *add_moca_rms_norm(x, residual, *vectors(t), t["weight"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = moca(x, *vectors(t)), *add_moca_rms_norm(x, residual, *vectors(t), t["weight"])
        registered = torch.ops.mir_kernels.moca(x, *vectors(t), None)
    assert all(o.dtype == dtype for o in cast)
    assert all(torch.equal(a, b) for a, b in zip((*plain, plain[0]), (*cast, registered), strict=True))


def test_inference_mode(t):
    with torch.inference_mode():
        x = t["x"].clone()
        expected = moca(x, *vectors(t))
        assert moca(x, *vectors(t), inplace=True) is x
        assert torch.equal(x, expected)
