"""moca and add_moca_rms_norm under torch.compile and checkpointing: equal results, and tensors saved for backward."""

import shutil

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels.moca.calls import vectors
from mir_kernels.ops.moca import add_moca_rms_norm, moca


def block(x, residual, scale, shift, mask, weight, inplace=False):
    y = moca(x * 2, scale, shift, mask, inplace=inplace)
    out, h = add_moca_rms_norm(y, residual, scale, shift, mask, weight)
    return out.sin() + h


def gradients(function, t, **keywords):
    t = {n: v if n == "mask" else v.clone().requires_grad_() for n, v in t.items()}
    names = ("x", "residual", "scale", "shift", "mask", "weight")
    out = function(*(t[n] for n in names), **keywords)
    out.backward(t["grad"].detach())
    return out, [t[n].grad for n in names if n != "mask"]


def assert_same(found, wanted):
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-6, atol=1e-6)
    for a, b in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_compile_has_no_graph_break_and_the_same_gradients(t, inplace):
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_same(gradients(compiled, t, inplace=inplace), gradients(block, t, inplace=inplace))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile's CPU code needs g++")
def test_inductor_gives_the_same_results(t):
    compiled = torch.compile(block, fullgraph=True)
    assert_same(gradients(compiled, t, inplace=True), gradients(block, t, inplace=True))


def test_compiled_in_place_changes_its_input(t):
    compiled = torch.compile(lambda x, *v: moca(x, *v, inplace=True), fullgraph=True, backend="aot_eager")
    x = t["x"].clone()
    out = compiled(x, *vectors(t))
    assert out is x
    assert torch.equal(x, moca(t["x"], *vectors(t)))


def test_compiled_code_serves_every_token_count(t):
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    with torch.no_grad():
        for tokens in (9, 5, 7, 3, 8):
            cut = {n: v[:, :tokens] if v.dim() > 1 else v for n, v in t.items()}
            arguments = [cut[n] for n in ("x", "residual", "scale", "shift", "mask", "weight")]
            torch.testing.assert_close(compiled(*arguments), block(*arguments))
    assert len(frames) <= 2, "one graph for the first count, one for all others"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_checkpointing_gives_the_same_gradients(t, reentrant, inplace):
    def checkpointed(*arguments):
        return checkpoint(block, *arguments, inplace, use_reentrant=reentrant)

    found, wanted = gradients(checkpointed, t), gradients(block, t, inplace=inplace)
    assert torch.equal(found[0], wanted[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], wanted[1], strict=True))


def test_with_a_frozen_scale_x_is_not_kept(t):
    x, residual = (t[n].clone().requires_grad_() for n in ("x", "residual"))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: sizes.append(s.data_ptr()) or s, lambda s: s):
        moca(x, t["scale"], t["shift"].requires_grad_(), t["mask"])
        add_moca_rms_norm(x, residual, *vectors(t), t["weight"])
    assert sizes
    assert not {x.data_ptr(), residual.data_ptr()} & set(sizes)
