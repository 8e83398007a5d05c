"""moca in place: tensors that cannot change raise first, autograd sees the change, backward saves only vision rows."""

import pytest
import torch

from kernels.moca.calls import D, vectors
from mir_kernels.ops.moca import moca


def test_a_leaf_that_requires_grad_is_not_changed_in_place(t):
    leaf = t["x"].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="x: a leaf that requires grad cannot be changed in place"):
        moca(leaf, *vectors(t), inplace=True)
    assert torch.equal(leaf, t["x"])
    with torch.no_grad():
        moca(leaf, *vectors(t), inplace=True)
    assert torch.equal(leaf, moca(t["x"], *vectors(t)))


def test_an_expanded_tensor_is_not_changed_in_place(t):
    x = t["x"][:1].expand(2, 9, D)
    with pytest.raises(ValueError, match="x: an expanded tensor cannot be changed in place"):
        moca(x, *vectors(t), inplace=True)
    assert torch.equal(x[0], t["x"][0])


VIEWS = {
    "of a leaf": (lambda leaf: leaf[:1], "a leaf that requires grad"),
    "by unbind": (lambda leaf: (leaf * 1).unbind(0)[0][None], "a view made by unbind"),
    "without gradients": (lambda leaf: torch.no_grad()(lambda base: base[:1])(leaf * 1), "a view made by unbind"),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen scale", "trained scale"])
def test_a_view_that_autograd_refuses_is_refused_before_it_changes(t, view, trained):
    make, reason = VIEWS[view]
    x = make(t["x"].clone().requires_grad_())
    with pytest.raises(RuntimeError, match=f"x: {reason}"):
        moca(x, t["scale"].requires_grad_(trained), t["shift"], t["mask"][:1], inplace=True)
    assert torch.equal(x, t["x"][:1])


@pytest.mark.parametrize("grad", [False, True])
def test_a_tensor_of_inference_mode_is_not_changed_outside_it(t, grad):
    with torch.inference_mode():
        x = t["x"].clone()
    with pytest.raises(RuntimeError, match="x: a tensor made in inference mode"):
        moca(x, t["scale"].requires_grad_(grad), t["shift"], t["mask"], inplace=True)
    assert torch.equal(x, t["x"])


def test_rows_that_overlap_are_not_changed_in_place(t):
    storage = t["x"].flatten()[:40].clone()
    before = storage.clone()
    with pytest.raises(ValueError, match="x: an expanded tensor cannot be changed in place"):
        moca(storage.as_strided((4, D), (4, 1)), t["scale"], t["shift"], t["mask"][0, :4], inplace=True)
    assert torch.equal(storage, before)


@pytest.mark.parametrize("grad", [False, True])
def test_autograd_notices_a_change_in_place(t, grad):
    x = t["x"].clone().requires_grad_()
    y = x * 1
    loss = y.square().sum()  # saves y
    if grad:
        moca(y, *vectors(t), inplace=True)
    else:
        with torch.no_grad():
            moca(y, *vectors(t), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_through_a_view_reaches_the_base(t):
    scale = t["scale"].requires_grad_()
    x = t["x"].clone().requires_grad_()
    base = x * 1
    moca(base[:, 2:7], scale, t["shift"], t["mask"][:, 2:7], inplace=True)
    inside = torch.zeros_like(t["mask"])
    inside[:, 2:7] = t["mask"][:, 2:7]
    expected = moca(x, scale, t["shift"], inside)
    assert torch.equal(base, expected)
    found, wanted = (torch.autograd.grad(o, (x, scale), t["grad"]) for o in (base, expected))
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1])  # the view has fewer rows, which may be added in a different order


@pytest.mark.parametrize(("frozen", "expected"), [(False, "vision rows"), (True, "nothing")])
def test_in_place_keeps_for_backward_the_vision_rows_only(t, frozen, expected):
    sizes = []
    scale = t["scale"].requires_grad_(not frozen)
    x = t["x"].clone().requires_grad_() * 1
    with torch.autograd.graph.saved_tensors_hooks(lambda s: sizes.append(s.numel()) or s, lambda s: s):
        moca(x, scale, t["shift"].requires_grad_(), t["mask"], inplace=True)
    kept = int(t["mask"].sum()) * D + t["mask"].numel() if expected == "vision rows" else 0  # and the row indices
    assert sum(sizes) == kept + t["scale"].numel() + t["shift"].numel() + t["mask"].numel()
