"""How moca, add_moca_rms_norm and MoCa behave inside torch: refusals, autograd, compile, checkpointing, autocast."""

import copy
import gc
import shutil
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from mir_kernels.moca import OPERATIONS, MoCa, add_moca_rms_norm, moca, rows

D = 16


@pytest.fixture
def t():
    """x (2, 9, 16) and what goes with it, in float32."""
    g = torch.Generator().manual_seed(0)
    made = {name: torch.randn(2, 9, D, generator=g) for name in ("x", "residual", "grad")}
    made |= {name: torch.randn(D, generator=g) for name in ("scale", "shift", "weight")}
    return made | {"mask": torch.rand(2, 9, generator=g) < 0.5}


def vectors(t):
    return t["scale"], t["shift"], t["mask"]


BAD = [
    ("x", lambda t: t["x"].tolist(), TypeError, "x: takes a torch.Tensor, got list"),
    ("x", lambda t: t["x"].int(), TypeError, "x: takes a dtype of .* got int32"),
    ("x", lambda t: torch.tensor(1.0), ValueError, r"x: takes shape \(\.\.\., d\)"),
    ("x", lambda t: torch.empty(3, 0), ValueError, r"x: takes shape \(\.\.\., d\) with d >= 1"),
    ("scale", lambda t: t["scale"][1:], ValueError, r"scale: takes shape \(16,\), got \(15,\)"),
    ("scale", lambda t: t["scale"].long(), TypeError, "scale: takes a dtype of .* got int64"),
    ("shift", lambda t: t["shift"][None], ValueError, r"shift: takes shape \(16,\), got \(1, 16\)"),
    ("shift", lambda t: t["shift"].to("meta"), ValueError, "shift: lies on meta, but x lies on cpu"),
    ("mask", lambda t: t["mask"][:1], ValueError, r"mask: takes one entry per token, shape \(2, 9\), got \(1, 9\)"),
    ("mask", lambda t: t["mask"][..., None], ValueError, r"mask: .* got \(2, 9, 1\)"),
    ("mask", lambda t: t["mask"].long(), TypeError, "mask: takes a dtype of .* got int64"),
    ("residual", lambda t: t["residual"][:1], ValueError, r"residual: takes x's shape and dtype, \(2, 9, 16\) float32"),
    ("residual", lambda t: t["residual"].bfloat16(), ValueError, "residual: .* bfloat16"),
    ("weight", lambda t: t["weight"][1:], ValueError, r"weight: takes shape \(16,\), got \(15,\)"),
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
    with pytest.raises(TypeError, match=f"{name}: takes a dense tensor, got torch.sparse_coo"):
        moca(t["x"], *vectors(t))


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
    loss = y.square().sum()  # keeps y
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
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_in_place_counts_the_vision_rows_once_a_mask(t, monkeypatch):
    counted = []
    nonzero = torch.Tensor.nonzero
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda self: counted.append(1) or nonzero(self))
    scale, mask = t["scale"].requires_grad_(), t["mask"].clone()

    def two_layers():
        h = t["x"] * 1
        for _ in range(2):
            h = moca(h, scale, t["shift"], mask, inplace=True)
        return h

    found = torch.autograd.grad(two_layers(), scale, t["grad"])
    assert len(counted) == 1
    mask.logical_not_()
    other = torch.autograd.grad(two_layers(), scale, t["grad"])
    assert len(counted) == 2
    for sums, vision in ((found, ~mask), (other, mask)):
        twice = moca(moca(t["x"], scale, t["shift"], vision), scale, t["shift"], vision)
        assert torch.equal(sums[0], torch.autograd.grad(twice, scale, t["grad"])[0])


def test_what_is_known_of_a_mask_goes_when_it_goes(t):
    gc.collect()
    before, mask = len(rows._PLACES), t["mask"].clone()
    moca(t["x"] * 1, t["scale"].requires_grad_(), t["shift"], mask, inplace=True).sum().backward()
    assert len(rows._PLACES) == before + 1
    del mask
    gc.collect()
    assert len(rows._PLACES) == before


@pytest.mark.parametrize(("frozen", "expected"), [(False, "vision rows"), (True, "nothing")])
def test_in_place_keeps_for_backward_the_vision_rows_only(t, frozen, expected):
    sizes = []
    scale = t["scale"].requires_grad_(not frozen)
    x = t["x"].clone().requires_grad_() * 1
    with torch.autograd.graph.saved_tensors_hooks(lambda s: sizes.append(s.numel()) or s, lambda s: s):
        moca(x, scale, t["shift"].requires_grad_(), t["mask"], inplace=True)
    kept = (
        int(t["mask"].sum()) * D + t["mask"].numel() if expected == "vision rows" else 0
    )  # and which of them is whose
    assert sum(sizes) == kept + t["scale"].numel() + t["shift"].numel() + t["mask"].numel()


def test_with_a_frozen_scale_x_is_not_kept(t):
    x, residual = (t[n].clone().requires_grad_() for n in ("x", "residual"))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: sizes.append(s.data_ptr()) or s, lambda s: s):
        moca(x, t["scale"], t["shift"].requires_grad_(), t["mask"])
        add_moca_rms_norm(x, residual, *vectors(t), t["weight"])
    assert sizes
    assert not {x.data_ptr(), residual.data_ptr()} & set(sizes)


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
    with pytest.raises(RuntimeError, match="differentiable once"):
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


class Wrapped(torch.Tensor):
    """A tensor without memory of its own, as DTensor is; counts the registered operations that it is asked for."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        Wrapped.seen.append(function._schema.name)
        return function(*(a.inner if isinstance(a, Wrapped) else a for a in args), **(kwargs or {}))


FORWARD = {
    "moca": lambda t: (moca(t["x"], *vectors(t)),),
    "add_moca_rms_norm": lambda t: add_moca_rms_norm(t["x"], t["residual"], *vectors(t), t["weight"]),
}


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
        warnings.simplefilter("ignore")  # that tracing is on its way out, and which checks it does not record
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


def test_module_starts_as_the_identity_and_learns_scale_and_shift(t):
    module = MoCa(D)
    assert torch.equal(module(t["x"], t["mask"]), t["x"])
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == {"scale": (D,), "shift": (D,)}
    module(t["x"].requires_grad_() * 1, t["mask"], inplace=True).backward(t["grad"])
    chosen = t["grad"][t["mask"]]
    torch.testing.assert_close(module.shift.grad, chosen.sum(0))
    torch.testing.assert_close(module.scale.grad, (chosen * t["x"][t["mask"]]).sum(0))


def test_module_starts_random_with_a_standard_deviation():
    torch.manual_seed(0)
    module = MoCa(4096, std=0.02, dtype=torch.float64)
    assert abs(module.scale.mean().item() - 1) < 2e-3
    assert abs(module.shift.mean().item()) < 2e-3
    for parameter in module.parameters():
        assert abs(parameter.std().item() - 0.02) < 1e-3
        assert parameter.dtype == torch.float64
    assert MoCa(3, device="meta").scale.is_meta
    assert repr(module) == "MoCa(4096, std=0.02)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 0}, "hidden_size: takes an integer >= 1, got 0"),
        ({"hidden_size": 2.0}, "hidden_size: .* got 2.0"),
        ({"hidden_size": 4, "std": -1.0}, "std: takes a standard deviation >= 0, got -1.0"),
        ({"hidden_size": 4, "std": float("nan")}, "std: .* got nan"),
    ],
)
def test_module_refuses_bad_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        MoCa(**arguments)


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
