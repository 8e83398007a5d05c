"""add_moca_rms_norm on every backend: forward has the bits of the separate operations, backward is one float32 pass."""

import os

import pytest
import torch

from mir_kernels.ops.moca import add_moca_rms_norm, moca
from tolerances import RELATIVE, assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WIDTHS = [1, 7, 576, 4096, 8200]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # slow: all widths in bfloat16, all dtypes in two widths
CASES = [(t, d) for t in DTYPES for d in WIDTHS if not INTERPRETED or t == torch.bfloat16 or d in (7, 576)]
NAMES = ("x", "residual", "scale", "shift", "weight")


def inputs(run, dtype, d, tokens=11, *, seed=0):
    """A dict of the tensors, and gradients of out and h. The mask has vision and text rows."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape, dtype=wide, mean=0.0):
        return torch.randn(*shape, generator=g, dtype=torch.float64).add_(mean).to(dtype).to(run.device)

    mask = torch.rand(1, tokens, generator=g) < 0.5
    mask[0, : min(tokens, 2)] = torch.tensor([True, False])[:tokens]
    tensors = {
        "x": normal(1, tokens, d, dtype=dtype),
        "residual": normal(1, tokens, d, dtype=dtype, mean=1.0),
        "scale": normal(d, mean=1.0),
        "shift": normal(d),
        "mask": mask.to(run.device),
        "weight": normal(d, dtype=dtype, mean=1.0),
    }
    return tensors, normal(1, tokens, d, dtype=dtype), normal(1, tokens, d, dtype=dtype)


def call(tensors, run, eps=1e-6):
    return add_moca_rms_norm(**tensors, eps=eps, backend=run.backend)


def gradients(tensors, run, grad_out, grad_h, eps=1e-6):
    """{name: gradient} from autograd; one of the upstream gradients may be None."""
    tensors = tensors | {n: tensors[n].detach().requires_grad_() for n in NAMES}
    outputs = call(tensors, run, eps)
    pairs = [(o, g) for o, g in zip(outputs, (grad_out, grad_h), strict=True) if g is not None]
    leaves = [tensors[n] for n in NAMES]
    found = torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs])
    return dict(zip(NAMES, found, strict=True))


def exact_gradients(tensors, grad_out, grad_h, eps=1e-6):
    """{name: gradient} from torch's autograd through the formula in float64."""
    t = {n: v.detach().double().requires_grad_() if n in NAMES else v for n, v in tensors.items()}
    p = t["x"] + t["residual"]
    h = torch.where(t["mask"][..., None], t["scale"] * p + t["shift"], p)
    out = t["weight"] * h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    loss = sum((o * g.double()).sum() for o, g in ((out, grad_out), (h, grad_h)) if g is not None)
    leaves = [t[n] for n in NAMES]
    return dict(zip(NAMES, torch.autograd.grad(loss, leaves, materialize_grads=True), strict=True))


@pytest.mark.parametrize(("dtype", "d"), CASES, ids=str)
def test_h_has_the_bits_of_the_separate_operations_and_out_is_close(run, dtype, d):
    tensors, _, _ = inputs(run, dtype, d)
    before = {n: t.clone() for n, t in tensors.items()}
    out, h = call(tensors, run)
    vectors = (tensors["scale"], tensors["shift"], tensors["mask"])
    assert torch.equal(h, moca(tensors["x"] + tensors["residual"], *vectors, backend=run.backend))
    exact = h.double()
    exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-6) * tensors["weight"].double()
    assert_close(out, exact)
    assert out.dtype == h.dtype == dtype
    assert all(torch.equal(t, before[n]) for n, t in tensors.items())


@pytest.mark.parametrize(("dtype", "d"), CASES, ids=str)
def test_gradients_of_both_outputs_match_float64(run, dtype, d):
    tensors, grad_out, grad_h = inputs(run, dtype, d)
    ours = gradients(tensors, run, grad_out, grad_h)
    exact = exact_gradients(tensors, grad_out, grad_h)
    rows = []
    for i in range(grad_out.shape[1]):
        row = tensors | {n: tensors[n][:, i : i + 1] for n in ("x", "residual", "mask")}
        rows.append(exact_gradients(row, grad_out[:, i : i + 1], grad_h[:, i : i + 1]))
    for name in NAMES:
        # A column sum may cancel, so its error is relative to the sum of the magnitudes.
        size = exact[name] if name in ("x", "residual") else sum(row[name].abs() for row in rows)
        error = (ours[name].double() - exact[name]).norm() / size.norm()
        assert error <= RELATIVE[dtype], f"{name}: {error:.2e}"
        assert ours[name].dtype == tensors[name].dtype
    assert torch.equal(ours["x"], ours["residual"])


@pytest.mark.parametrize("used", ["out", "h"])
@pytest.mark.parametrize("d", [576, 8200])
def test_an_output_that_is_not_used_adds_nothing(run, used, d):
    tensors, grad_out, grad_h = inputs(run, torch.float32, d, 5)
    given = (grad_out, None) if used == "out" else (None, grad_h)
    ours, exact = gradients(tensors, run, *given), exact_gradients(tensors, *given)
    for name in NAMES:
        if used == "h" and name == "weight":
            assert not ours[name].any()
        else:
            assert_close(ours[name], exact[name], factor=2)


def test_frozen_inputs_get_no_gradient_and_change_no_other(run):
    tensors, grad_out, grad_h = inputs(run, torch.float32, 24, 9)
    every = gradients(tensors, run, grad_out, grad_h)
    for name in NAMES:
        leaves = tensors | {n: tensors[n].detach().clone().requires_grad_(n != name) for n in NAMES}
        torch.autograd.backward(call(leaves, run), (grad_out, grad_h))
        assert leaves[name].grad is None
        assert all(torch.equal(leaves[n].grad, every[n]) for n in NAMES if n != name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_give_the_same_bits(run, dtype):
    tensors, grad_out, grad_h = inputs(run, dtype, 576, 20 if INTERPRETED else 300)
    first, second = (gradients(tensors, run, grad_out, grad_h) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in NAMES)


def test_sums_do_not_depend_on_the_number_of_threads(run):
    if run.device != "cpu" or run.backend == "triton":
        pytest.skip("threads are those of the CPU kernels")
    tensors, grad_out, grad_h = inputs(run, torch.bfloat16, 96, 3000)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(gradients(tensors, run, grad_out, grad_h))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][n], other[n]) for other in results[1:] for n in NAMES)


def test_layout_does_not_change_a_bit(run):
    tensors, grad_out, grad_h = inputs(run, torch.bfloat16, 40, 10)
    every = gradients(tensors, run, grad_out, grad_h)
    plain = call(tensors, run)

    def wide(t):
        return torch.cat([t, t], -1)[..., : t.shape[-1]]

    def turned(t):
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    other = tensors | {"x": wide(tensors["x"]), "residual": turned(tensors["residual"])}
    assert all(torch.equal(a, b) for a, b in zip(plain, call(other, run), strict=True))
    found = gradients(other, run, turned(grad_out), wide(grad_h))
    assert all(torch.equal(found[n], every[n]) for n in NAMES)


def test_no_tokens_give_no_rows_and_zero_sums(run):
    tensors, grad_out, grad_h = inputs(run, torch.bfloat16, 8, 3)
    empty = tensors | {n: tensors[n][:, :0] for n in ("x", "residual", "mask")}
    out, h = call(empty, run)
    assert out.shape == h.shape == (1, 0, 8)
    found = gradients(empty, run, grad_out[:, :0], grad_h[:, :0])
    assert not any(found[n].any() for n in ("scale", "shift", "weight"))


@pytest.mark.parametrize("tokens", [1, 12])
@pytest.mark.parametrize("vision", [True, False], ids=["all vision", "all text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batches_of_one_kind_and_of_one_token(run, dtype, vision, tokens):
    tensors, grad_out, grad_h = inputs(run, dtype, 576, tokens)
    tensors["mask"] = torch.full_like(tensors["mask"], vision)
    out, h = call(tensors, run)
    p = tensors["x"] + tensors["residual"]
    vectors = (tensors["scale"], tensors["shift"], tensors["mask"])
    assert torch.equal(h, moca(p, *vectors, backend=run.backend) if vision else p)
    wide = h.double()
    assert_close(out, wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * tensors["weight"].double())
    ours, exact = gradients(tensors, run, grad_out, grad_h), exact_gradients(tensors, grad_out, grad_h)
    for name in NAMES if vision else ("x", "residual", "weight"):
        assert_close(ours[name], exact[name], dtype=dtype, factor=2)
    if not vision:
        assert not ours["scale"].any()
        assert not ours["shift"].any()


# The interpreter adds a tile's rows sequentially, hardware adds them as a tree. A few rows suffice in the interpreter.
@pytest.mark.parametrize(("d", "tokens"), [(576, 60)] if INTERPRETED else [(7, 9001), (576, 2049)])
def test_column_sums_are_no_worse_than_twice_torchs_float32_sums(run, d, tokens):
    tensors, grad_out, grad_h = inputs(run, torch.float32, d, tokens)
    ours = gradients(tensors, run, grad_out, grad_h)
    # The terms of each sum in float32, added by torch in float32 and in float64.
    t = {n: tensors[n].double() for n in NAMES}
    h = call(tensors, run)[1]
    r = torch.rsqrt(h.double().square().mean(-1, keepdim=True) + 1e-6)
    n, dn = h.double() * r, t["weight"] * grad_out.double()
    dh = grad_h.double() + r * (dn - n * (dn * n).mean(-1, keepdim=True))
    vision = tensors["mask"]
    terms = {
        "scale": (dh * (tensors["x"] + tensors["residual"]).double())[vision],
        "shift": dh[vision],
        "weight": (grad_out.double() * n).view(-1, d),
    }
    for name, term in terms.items():
        exact = term.sum(0)
        torchs = (term.float().sum(0).double() - exact).norm()
        # Each term has a random error of a few float32 roundings, whatever adds the terms.
        rounding = 2.0**-24 * (2 * term.norm() + exact.norm())
        assert (ours[name].double() - exact).norm() <= 2 * torchs + rounding, name


def test_gradients_pass_gradcheck_in_float64(run):
    tensors, _, _ = inputs(run, torch.float64, 5, 4)
    leaves = [tensors[n].requires_grad_() for n in NAMES]
    mask = tensors["mask"]

    def fused(x, residual, scale, shift, weight):
        return add_moca_rms_norm(x, residual, scale, shift, mask, weight, eps=1e-3, backend=run.backend)

    assert torch.autograd.gradcheck(fused, leaves, fast_mode=INTERPRETED)


def llama(run, d, dtype, weight, eps=1e-6):
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    norm = modeling.LlamaRMSNorm(d, eps=eps).to(run.device, dtype)
    norm.weight.data.copy_(weight)
    return norm


@pytest.mark.parametrize("d", [64, 576, 4096])
def test_without_vision_rows_it_has_the_bits_of_llamas_norm_where_the_mean_is_exact(run, d):
    # Small integers: the sum of squares is exact in float32 in any order, so all later roundings can be compared.
    g = torch.Generator().manual_seed(0)
    x, residual = (torch.randint(-4, 5, (1, 9, d), generator=g).to(torch.bfloat16).to(run.device) for _ in range(2))
    weight = torch.randn(d, generator=g).to(torch.bfloat16).to(run.device)
    vector, mask = torch.ones(d, device=run.device), torch.zeros(1, 9, dtype=torch.bool, device=run.device)
    out, h = add_moca_rms_norm(x, residual, vector, vector, mask, weight, backend=run.backend)
    assert torch.equal(h, x + residual)
    assert torch.equal(out, llama(run, d, torch.bfloat16, weight)(x + residual))


def test_without_vision_rows_it_is_llamas_norm_on_any_input(run):
    # The mean of squares may differ in its last float32 bit, which changes a bf16 rounding about once in 2^16 elements.
    tensors, _, _ = inputs(run, torch.bfloat16, 576, 64)
    tensors["mask"] = torch.zeros_like(tensors["mask"])
    out, h = call(tensors, run)
    expected = llama(run, 576, torch.bfloat16, tensors["weight"])(tensors["x"] + tensors["residual"])
    assert torch.equal(h, tensors["x"] + tensors["residual"])
    if run.backend == "eager":
        assert torch.equal(out, expected)
    assert (out != expected).float().mean() < 1e-3
    assert ((out.double() - expected.double()).abs() <= 2.0**-7 * expected.double().abs()).all()


def test_rows_beyond_32_bit_offsets_are_found(run):
    # Three rows 2^30 elements apart: the last begins at element 2^31. Only the pages of the rows are touched.
    d, apart = 16, 2**30
    tensors, grad_out, grad_h = inputs(run, torch.bfloat16, d, 3)
    near = {n: t[0] if n in ("x", "residual", "mask") else t for n, t in tensors.items()}
    expected, every = call(near, run), gradients(near, run, grad_out[0], grad_h[0])
    memory = torch.empty(2 * apart + d, dtype=torch.bfloat16, device=run.device).as_strided((3, d), (apart, 1))
    for name in ("x", "residual"):
        far = near | {name: memory.copy_(near[name])}
        assert all(torch.equal(a, b) for a, b in zip(expected, call(far, run), strict=True))
        found = gradients(far, run, grad_out[0], grad_h[0])
        assert all(torch.equal(found[n], every[n]) for n in NAMES)
    for which in (0, 1):
        upstream = [grad_out[0], grad_h[0]]
        upstream[which] = memory.copy_(upstream[which])
        found = gradients(near, run, *upstream)
        assert all(torch.equal(found[n], every[n]) for n in NAMES)
