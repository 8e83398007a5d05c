"""moca on every backend: rounding, untouched rows, gradients, column sums, strides, masks, offsets beyond 32 bits."""

import os

import pytest
import torch

from mir_kernels.ops.moca import moca
from tolerances import RELATIVE, assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WIDTHS = [1, 7, 576, 4096, 8200]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # slow: all widths in bfloat16, all dtypes in two widths
CASES = [(t, d) for t in DTYPES for d in WIDTHS if not INTERPRETED or t == torch.bfloat16 or d in (7, 576)]
BITS = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11, torch.float64: 53}
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def inputs(run, dtype, d, tokens=11, *, vector_dtype=None, seed=0):
    """x (1, tokens, d), scale, shift, mask with vision and text rows, grad."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, tokens, d, generator=g, dtype=torch.float64).mul_(3).add_(1)
    scale = torch.randn(d, generator=g, dtype=torch.float64).add_(1)
    shift = torch.randn(d, generator=g, dtype=torch.float64)
    grad = torch.randn(1, tokens, d, generator=g, dtype=torch.float64)
    mask = torch.rand(1, tokens, generator=g) < 0.5
    mask[0, : min(tokens, 2)] = torch.tensor([True, False])[:tokens]
    vector_dtype = vector_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
    move = lambda t, dt: t.to(dt).to(run.device)  # noqa: E731
    return move(x, dtype), move(scale, vector_dtype), move(shift, vector_dtype), mask.to(run.device), move(grad, dtype)


def bits(x):
    return x.contiguous().view(INTEGERS[x.element_size()])


def strange(x):
    """Bit patterns that arithmetic may change: NaN with a payload, both infinities, -0.0, the smallest subnormal."""
    width = 8 * x.element_size()
    infinity = bits(torch.tensor(float("inf"), dtype=x.dtype)).item()
    patterns = torch.tensor([infinity + 1, infinity, infinity - 2 ** (width - 1), -(2 ** (width - 1)), 1])
    repeated = patterns[torch.arange(x.numel()) % len(patterns)].to(INTEGERS[x.element_size()])
    return repeated.view(x.dtype).view(x.shape).to(x.device)


def assert_rounded_once(out, exact, *, slack=0.0):
    """Assert that |out - exact| is at most half an ulp of out's dtype, plus an earlier float32 rounding, plus slack."""
    p = BITS[out.dtype]
    lowest = torch.finfo(out.dtype).smallest_normal
    _, exponent = torch.frexp(exact.abs().clamp_min(lowest))
    ulp = torch.ldexp(torch.ones_like(exact), exponent - p)
    double = 2.0**-52 if p > 24 else 2.0**-24 if p < 24 else 2.0**-50
    limit = ulp / 2 + exact.abs() * double + slack
    worst = ((out.double() - exact).abs() / limit).max().item()
    assert worst <= 1, f"{worst:.3f} times half an ulp"


def product_rounding(run, dtype, product):
    """The additional error of plain torch if its addcmul does not fuse: a rounding of the product."""
    if dtype == torch.float64 or run.backend == "eager":
        return product.abs() * 2.0 ** -(53 if dtype == torch.float64 else 24)
    return 0.0


@pytest.mark.parametrize(("dtype", "d"), CASES, ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_vision_rows_are_rounded_once_and_text_rows_keep_their_bits(run, dtype, d, inplace):
    x, scale, shift, mask, _ = inputs(run, dtype, d)
    x[~mask] = strange(x[~mask])
    before = x.clone()
    others = [t.clone() for t in (scale, shift, mask)]
    out = moca(x, scale, shift, mask, inplace=inplace, backend=run.backend)
    assert (out is x) == inplace
    assert out.dtype == dtype
    assert torch.equal(bits(out[~mask]), bits(before[~mask]))
    product = scale.double() * before[mask].double()
    slack = product_rounding(run, dtype, product)
    assert_rounded_once(out[mask], product + shift.double(), slack=slack)
    if not inplace:
        assert torch.equal(bits(x), bits(before))
    assert all(torch.equal(a, b) for a, b in zip((scale, shift, mask), others, strict=True))


@pytest.mark.parametrize(("dtype", "d"), CASES, ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_gradient_of_x_is_rounded_once_and_text_rows_of_x_are_not_looked_at(run, dtype, d, inplace):
    x, scale, shift, mask, grad = inputs(run, dtype, d)
    x[~mask] = float("nan")
    grad[~mask] = strange(grad[~mask])
    kept = grad.clone()
    leaf, scale = x.clone().requires_grad_(), scale.requires_grad_()
    shift = shift.requires_grad_()
    given = leaf.clone() if inplace else leaf
    out = moca(given, scale, shift, mask, inplace=inplace, backend=run.backend)
    dx, dscale, dshift = torch.autograd.grad(out, (given if not inplace else leaf, scale, shift), grad)
    assert torch.equal(bits(grad), bits(kept))
    assert torch.equal(bits(dx[~mask]), bits(grad[~mask]))
    assert_rounded_once(dx[mask], scale.detach().double() * grad[mask].double())
    g, wide = grad[mask].double(), x[mask].double()
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    assert_close(dscale, (g * wide).sum(0), dtype=arithmetic)
    assert_close(dshift, g.sum(0), dtype=arithmetic)


# The interpreter adds a tile's rows sequentially, hardware adds them as a tree. A few rows suffice in the interpreter.
@pytest.mark.parametrize(("d", "tokens"), [(576, 60)] if INTERPRETED else [(7, 9001), (576, 2049)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_column_sums_are_no_worse_than_twice_torchs_float32_sums(run, dtype, d, tokens):
    x, scale, shift, mask, grad = inputs(run, dtype, d, tokens)
    scale, shift = scale.requires_grad_(), shift.requires_grad_()
    out = moca(x, scale, shift, mask, backend=run.backend)
    sums = torch.autograd.grad(out, (scale, shift), grad)
    for ours, terms in zip(sums, (grad[mask].double() * x[mask].double(), grad[mask].double()), strict=True):
        exact = terms.sum(0)
        torchs = (terms.float().sum(0).double() - exact).norm()
        rounding = 2.0**-24 * (terms.norm() + exact.norm())  # of the terms and the result: unavoidable
        assert (ours.double() - exact).norm() <= 2 * torchs + rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_give_the_same_bits(run, dtype):
    x, scale, shift, mask, grad = inputs(run, dtype, 576, 40 if INTERPRETED else 301)
    scale, shift, x = scale.requires_grad_(), shift.requires_grad_(), x.requires_grad_()

    def once():
        out = moca(x, scale, shift, mask, backend=run.backend)
        return [out.detach(), *torch.autograd.grad(out, (x, scale, shift), grad)]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


def test_sums_do_not_depend_on_the_number_of_threads(run):
    if run.device != "cpu" or run.backend == "triton":
        pytest.skip("threads are those of the CPU kernels")
    x, scale, shift, mask, grad = inputs(run, torch.bfloat16, 96, 5000)
    scale, shift = scale.requires_grad_(), shift.requires_grad_()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = moca(x, scale, shift, mask, backend=run.backend)
            results.append(torch.autograd.grad(out, (scale, shift), grad))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


LAYOUTS = {
    "columns of a wider tensor": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "every other token": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "channels first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "tokens first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other column": lambda x: x.repeat_interleave(2, dim=2)[..., ::2],
    "one element into its storage": lambda x: torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("d", [1, 7, 64])
def test_layout_of_input_and_gradient_does_not_change_a_bit(run, layout, d):
    x, scale, shift, mask, grad = inputs(run, torch.bfloat16, d, 22)
    x, mask, grad = x.view(2, 11, d), mask.view(2, 11), grad.view(2, 11, d)
    scale, shift = scale.requires_grad_(), shift.requires_grad_()

    def results(x, mask, grad, inplace):
        leaf = x.detach().requires_grad_()
        given = LAYOUTS[layout](leaf * 1) if inplace else leaf
        out = moca(given, scale, shift, mask, inplace=inplace, backend=run.backend)
        return [out.detach(), *torch.autograd.grad(out, (leaf, scale, shift), grad)]

    plain = results(x, mask, grad, False)
    spread_mask = mask.repeat_interleave(2, dim=1)[:, ::2]
    for inplace in (False, True):
        other = results(LAYOUTS[layout](x), spread_mask, LAYOUTS[layout](grad), inplace)
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_in_place_leaves_memory_between_the_rows_alone(run):
    x, scale, shift, mask, _ = inputs(run, torch.bfloat16, 16, 9)
    base = torch.full((1, 9, 40), float("nan"), dtype=x.dtype, device=run.device)
    base[..., 8:24] = x
    moca(base[..., 8:24], scale, shift, mask, inplace=True, backend=run.backend)
    assert torch.equal(base[..., 8:24], moca(x, scale, shift, mask, backend=run.backend))
    assert base[..., :8].isnan().all()
    assert base[..., 24:].isnan().all()


def test_expanded_rows_are_read_right(run):
    row, scale, shift, _, grad = inputs(run, torch.float32, 64, 1)
    x = row.expand(1, 6, 64)
    mask = torch.tensor([[True, False, True, True, False, False]], device=run.device)
    scale = scale.requires_grad_()
    out = moca(x, scale, shift, mask, backend=run.backend)
    (dscale,) = torch.autograd.grad(out, scale, grad.expand_as(x))
    assert torch.equal(out, moca(x.contiguous(), scale, shift, mask, backend=run.backend))
    assert_close(dscale, 3 * (grad.double() * row.double())[0, 0])


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0, 3, 8)], ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_no_tokens_give_no_rows_and_zero_sums(run, shape, inplace):
    leaf = torch.empty(shape, dtype=torch.bfloat16, device=run.device, requires_grad=True)
    scale, shift = (torch.ones(8, device=run.device, requires_grad=True) for _ in range(2))
    mask = torch.empty(shape[:-1], dtype=torch.bool, device=run.device)
    out = moca(leaf * 1, scale, shift, mask, inplace=inplace, backend=run.backend)
    dx, dscale, dshift = torch.autograd.grad(out, (leaf, scale, shift), torch.empty_like(out))
    assert out.shape == dx.shape == shape
    assert torch.equal(dscale, torch.zeros_like(scale))
    assert torch.equal(dshift, torch.zeros_like(shift))


def test_one_token_without_axes_is_a_row(run):
    x, scale, shift, _, _ = inputs(run, torch.float32, 7, 1)
    row = x[0, 0]
    for vision in (True, False):
        out = moca(row, scale, shift, torch.tensor(vision, device=run.device), backend=run.backend)
        assert_close(out, scale.double() * row.double() + shift.double() if vision else row.double())
        assert out.shape == (7,)


@pytest.mark.parametrize("vision", [True, False], ids=["all vision", "all text"])
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_batches_of_one_kind(run, vision, inplace):
    x, scale, shift, mask, grad = inputs(run, torch.bfloat16, 576, 40)
    mask = torch.full_like(mask, vision)
    scale, shift, x = scale.requires_grad_(), shift.requires_grad_(), x.requires_grad_()
    out = moca(x * 1, scale, shift, mask, inplace=inplace, backend=run.backend)
    dx, dscale, dshift = torch.autograd.grad(out, (x, scale, shift), grad)
    if vision:
        g = grad.double()
        assert_close(out, scale.double() * x.double() + shift.double())
        assert_close(dx, scale.double() * g)
        assert_close(dscale, (g * x.double()).sum((0, 1)))
        assert_close(dshift, g.sum((0, 1)))
    else:
        assert torch.equal(bits(out), bits(x))
        assert torch.equal(bits(dx), bits(grad))
        assert not dscale.any()
        assert not dshift.any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_mask_dtypes_mean_the_same(run, dtype):
    x, scale, shift, mask, _ = inputs(run, torch.float32, 24, 19)
    expected = moca(x, scale, shift, mask, backend=run.backend)
    other = mask.to(dtype) * (200 if dtype == torch.uint8 else 0.5)
    assert torch.equal(moca(x, scale, shift, other.to(dtype), backend=run.backend), expected)


@pytest.mark.parametrize(
    ("scale_dtype", "shift_dtype"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float64, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_vectors_of_any_dtype_get_gradients_of_their_own(run, dtype, scale_dtype, shift_dtype):
    x, scale, shift, mask, grad = inputs(run, dtype, 24, 33)
    scale, shift = scale.to(scale_dtype).requires_grad_(), shift.to(shift_dtype).requires_grad_()
    out = moca(x, scale, shift, mask, backend=run.backend)
    dscale, dshift = torch.autograd.grad(out, (scale, shift), grad)
    assert (dscale.dtype, dshift.dtype) == (scale_dtype, shift_dtype)
    assert_close(out[mask], scale.double() * x[mask].double() + shift.double(), dtype=max_error(dtype, shift_dtype))
    assert_close(dscale, (grad[mask].double() * x[mask].double()).sum(0), dtype=max_error(scale_dtype, torch.float32))
    assert_close(dshift, grad[mask].double().sum(0), dtype=max_error(shift_dtype, torch.float32))


def max_error(*dtypes):
    return max(dtypes, key=RELATIVE.__getitem__)


def test_strided_vectors_are_read_right(run):
    x, scale, shift, mask, _ = inputs(run, torch.float32, 24, 9)
    both = torch.stack([scale, shift], 1)
    out = moca(x, both[:, 0], both[:, 1], mask, backend=run.backend)
    assert torch.equal(out, moca(x, scale, shift, mask, backend=run.backend))


@pytest.mark.parametrize("frozen", ["x", "scale", "shift", "scale and shift"])
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_frozen_inputs_get_no_gradient_and_change_no_other(run, frozen, inplace):
    x, scale, shift, mask, grad = inputs(run, torch.float32, 24, 33)
    tensors = {"x": x, "scale": scale, "shift": shift}

    def gradients(frozen):
        leaves = {n: t.detach().clone().requires_grad_(n not in frozen) for n, t in tensors.items()}
        out = moca(leaves["x"] * 1, leaves["scale"], leaves["shift"], mask, inplace=inplace, backend=run.backend)
        out.backward(grad)
        return {n: t.grad for n, t in leaves.items()}

    every, some = gradients(()), gradients(frozen.split(" and "))
    for name in tensors:
        assert (some[name] is None) == (name in frozen.split(" and "))
        assert some[name] is None or torch.equal(some[name], every[name])


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_gradients_pass_gradcheck_in_float64(run, inplace):
    x, scale, shift, mask, _ = inputs(run, torch.float64, 3, 6)
    leaves = [t.requires_grad_() for t in (x, scale, shift)]
    call = lambda x, *v: moca(x * 1, *v, mask, inplace=inplace, backend=run.backend)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves, fast_mode=INTERPRETED)


def test_rows_beyond_32_bit_offsets_are_found(run):
    # Three rows 2^30 elements apart: the last begins at element 2^31. Only the pages of the rows are touched.
    d, apart = 16, 2**30
    x, scale, shift, _, grad = inputs(run, torch.bfloat16, d, 3)
    mask = torch.tensor([False, True, True], device=run.device)
    far = torch.empty(2 * apart + d, dtype=torch.bfloat16, device=run.device).as_strided((3, d), (apart, 1))
    far.copy_(x[0])
    expected = moca(x[0], scale, shift, mask, backend=run.backend)
    assert torch.equal(moca(far, scale, shift, mask, backend=run.backend), expected)
    scale, shift = scale.requires_grad_(), shift.requires_grad_()
    near = torch.autograd.grad(moca(x[0], scale, shift, mask, backend=run.backend), (scale, shift), grad[0])
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            near,
            torch.autograd.grad(moca(far, scale, shift, mask, backend=run.backend), (scale, shift), grad[0]),
            strict=True,
        )
    )
    moca(far, scale.detach(), shift.detach(), mask, inplace=True, backend=run.backend)
    assert torch.equal(far, expected)
    far.copy_(grad[0])  # the memory now holds the gradient
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            near,
            torch.autograd.grad(moca(x[0], scale, shift, mask, backend=run.backend), (scale, shift), far),
            strict=True,
        )
    )
