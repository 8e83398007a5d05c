"""token_norms on every backend against float64, and as an operator under torch.compile."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mir_kernels.ops.moments import reference, token_norms
from mir_kernels.ops.moments.launch import TOKEN_NORMS
from tolerances import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
RUNS = [
    *(("cpu", name) for name in ("native", "eager", "reference")),
    *(pytest.param(("cuda", name), marks=pytest.mark.gpu) for name in ("triton", "eager")),
]


@pytest.fixture(params=RUNS, ids="-".join)
def run(request):
    device, backend = request.param
    if reason := TOKEN_NORMS.reason(backend, torch.device(device)):
        pytest.skip(reason)
    return device, backend


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (7,), (1, 1), (2, 3, 577), (33, 4097)], ids=str)
def test_norms_have_the_tokens_shape_and_are_right_to_float32(run, shape, dtype):
    device, backend = run
    x = torch.randn(shape).to(dtype).to(device)
    before = x.clone()
    out = token_norms(x, backend=backend)
    assert out.shape == shape[:-1]
    assert out.dtype == torch.float32
    assert_close(out, reference.token_norms(x))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_finite_token_overflows_on_the_way(run, dtype):
    device, backend = run
    info = torch.finfo(dtype)
    x = torch.zeros(4, 300)
    x[0, 7] = info.max
    x[1] = info.max / 20
    x[2, 5] = info.tiny
    x[3, ::50] = torch.tensor([3.0, 4.0, 0.0, 0.0, 0.0, 0.0])
    x = x.to(dtype).to(device)
    out = token_norms(x, backend=backend)
    assert torch.isfinite(out).all()
    for row in range(4):
        assert_close(out[row], x[row].double().norm())
    top = torch.full((1, 300), info.max, dtype=dtype, device=device)
    assert token_norms(top, backend=backend).item() == pytest.approx(
        min(info.max * 300**0.5, float("inf")), rel=1e-6
    ) or (
        dtype != torch.float16 and token_norms(top, backend=backend).isinf()  # the norm itself exceeds float32
    )


def test_any_strides(run):
    device, backend = run
    base = torch.randn(6, 10, 8, device=device)
    for x in (base.transpose(0, 2), base[:, ::3, 1:7], base[:1].expand(4, 10, 8), base.transpose(1, 2)[..., ::2]):
        assert_close(token_norms(x, backend=backend), reference.token_norms(x))


def test_nan_and_infinity_come_through(run):
    device, backend = run
    x = torch.tensor([[float("nan"), 1.0], [float("-inf"), 1.0], [3.0, 4.0]], device=device)
    out = token_norms(x, backend=backend).tolist()
    assert out[0] != out[0]
    assert out[1:] == [float("inf"), 5.0]


@settings(max_examples=40, deadline=None)
@given(
    x=st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3), min_size=1)
)
def test_any_float32_rows_have_the_norms_of_float64(x):
    rows = torch.tensor(x, dtype=torch.float32)
    for backend in ("eager", None):
        out = token_norms(rows, backend=backend)
        torch.testing.assert_close(out, rows.double().norm(dim=1).float(), rtol=3e-7, atol=1e-44)


def test_norms_carry_no_gradient():
    x = torch.randn(3, 4, requires_grad=True)
    assert not token_norms(x).requires_grad


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_the_operator_passes_opcheck_and_compiles_without_graph_breaks(backend):
    if reason := TOKEN_NORMS.reason(backend, torch.device("cpu")):
        pytest.skip(reason)
    x = torch.randn(5, 3, 33).bfloat16()
    torch.library.opcheck(torch.ops.mir_kernels.token_norms.default, (x, backend))

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def doubled(x):
        return 2 * token_norms(x, backend=backend)

    for rows in (5, 8):
        x = torch.randn(rows, 3, 33).bfloat16()
        assert torch.equal(doubled(x), 2 * token_norms(x, backend=backend))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (3.0, TypeError, "x: expected a torch.Tensor, got float"),
        (torch.ones(3, dtype=torch.int32), TypeError, "x: expected one of the dtypes .* got int32"),
        (torch.tensor(1.0), ValueError, r"x: expected shape \(\.\.\., d\)"),
        (torch.ones(3, 0), ValueError, r"x: expected shape \(\.\.\., d\)"),
    ],
)
def test_bad_input_is_named(x, error, message):
    with pytest.raises(error, match=message):
        token_norms(x)
