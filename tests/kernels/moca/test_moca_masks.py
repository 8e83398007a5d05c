"""MoCa uses the mask as it was at the call, even if NumPy, .data or DLPack overwrite it, unseen by torch."""

import pytest
import torch

from kernels.moca.calls import D
from mir_kernels.ops.moca import VisionMask, add_moca_rms_norm, moca

ROWS = 12


def masks(count=2):
    generator = torch.Generator("cpu").manual_seed(3)
    return [torch.rand(ROWS, generator=generator, dtype=torch.float32, device="cpu") < 0.5 for _ in range(count)]


def through_numpy(mask, values):
    mask.numpy()[...] = values.numpy()


def through_data(mask, values):
    mask.data.copy_(values)


def through_dlpack(mask, values):
    torch.from_dlpack(mask.view(torch.uint8)).copy_(values)


def in_the_open(mask, values):
    with torch.no_grad():
        mask.copy_(values)


def through_another_storage(mask, values):
    mask.set_(values.clone())


WRITERS = [through_numpy, through_data, through_dlpack, in_the_open, through_another_storage]
CALLS = {
    "new": lambda x, scale, shift, mask: moca(x, scale, shift, mask),
    "in place": lambda x, scale, shift, mask: moca(x * 1, scale, shift, mask, inplace=True),
    "fused": lambda x, scale, shift, mask: add_moca_rms_norm(x, x, scale, shift, mask, torch.ones_like(scale))[0],
}


def leaves(t):
    return [t[n].reshape(-1, D)[:ROWS].clone().requires_grad_() if n == "x" else t[n].clone().requires_grad_()
            for n in ("x", "scale", "shift")]  # fmt: skip


def gradients(out, tensors, t):
    return torch.autograd.grad(out, tensors, t["grad"].reshape(-1, D)[:ROWS])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("name", CALLS)
def test_backward_goes_by_the_mask_of_the_call(t, name, write, dtype):
    if dtype == torch.float32 and write is through_dlpack:
        pytest.skip("written as bytes")
    first, second = masks()
    mask = first.clone().to(dtype)
    tensors = leaves(t)
    outs = [CALLS[name](*tensors, mask)]
    write(mask, second.to(dtype))
    outs.append(CALLS[name](*tensors, mask))  # one buffer for all batches; the next forward comes before this backward
    write(mask, torch.ones_like(mask))
    for out, true in zip(outs, (first, second), strict=True):
        wanted = CALLS[name](*tensors, true)
        assert torch.equal(out, wanted)
        found = gradients(out, tensors, t)
        assert all(torch.equal(a, b) for a, b in zip(found, gradients(wanted, tensors, t), strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_a_shared_mask_is_the_mask_when_it_was_made(t, name):
    first, second = masks()
    mask, tensors = first.clone(), leaves(t)
    shared = VisionMask(mask)
    mask.numpy()[...] = second.numpy()
    found, wanted = (CALLS[name](*tensors, m) for m in (shared, first))
    assert torch.equal(found, wanted)
    pairs = zip(gradients(found, tensors, t), gradients(wanted, tensors, t), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_shared_mask_is_counted_once(t, monkeypatch):
    counted = []
    nonzero = torch.Tensor.nonzero
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda self: counted.append(1) or nonzero(self))
    scale = t["scale"].requires_grad_()
    for given, expected in ((VisionMask(t["mask"]), 1), (t["mask"], 3)):
        h = t["x"] * 1
        for _ in range(2):
            h = moca(h, scale, t["shift"], given, inplace=True)
        assert len(counted) == expected


# Tensors that hooks on saved tensors return in backward.


def reordered(x):
    return x.movedim(0, -1).contiguous().movedim(-1, 0) if x.dim() > 1 else x.repeat_interleave(2)[::2]


HOOKS = {
    "other strides": reordered,
    "negative view": lambda x: torch._neg_view(-x) if x.is_floating_point() else x,
    "a wider dtype": lambda x: x.double() if x.is_floating_point() else x,
    "a mask in floats": lambda x: x.float() if x.dtype == torch.bool else x,
    "narrow integers": lambda x: x.int() if x.dtype == torch.int64 else x,
    "a parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", CALLS)
def test_what_hooks_on_saved_tensors_give_back_is_read_right(t, name, hook):
    tensors, (mask, _) = leaves(t), masks()
    wanted = gradients(CALLS[name](*tensors, mask), tensors, t)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), HOOKS[hook]):
        found = gradients(CALLS[name](*tensors, mask), tensors, t)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CALLS)
def test_saved_tensors_that_come_back_in_another_shape_are_refused(t, name):
    tensors, (mask, _) = leaves(t), masks()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x[:-1] if x.dim() > 1 else x):
        out = CALLS[name](*tensors, mask)
        with pytest.raises(RuntimeError, match=r"hook on saved tensors returned shape|must match|shape"):
            gradients(out, tensors, t)
