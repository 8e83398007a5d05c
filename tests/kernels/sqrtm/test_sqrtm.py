"""sqrtm, inverse_sqrtm, polar and newton_schulz: accuracy, gradients, shapes, dtypes, errors."""

import subprocess
import sys
import warnings

import pytest
import torch

from kernels.covariances import SPECTRA, covariance
from mir_kernels.ops.sqrtm import eager, inverse_sqrtm, newton_schulz, polar, reference, sqrtm
from tolerances import relative_error

D = 48
METHODS = ["auto", "eigh", "polar"]
# The allowed error of a root, |X - A^(1/2)| / |A^(1/2)|, by precision of the iteration.
LIMIT = {"bfloat16": 2e-2, "float16": 5e-3, "float32": 4e-6, "float64": 2e-7}
DEFINITE = [k for k in SPECTRA if k not in ("rank d/4", "zero columns", "zero", "condition 1e12")]


def matrices(kind: str) -> torch.Tensor:
    return torch.stack([covariance(kind, D, seed) for seed in range(2)])


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", list(LIMIT))
def test_square_root_is_as_accurate_as_its_precision(kind, method, precision):
    a = matrices(kind)
    x = sqrtm(a, method=method, precision=precision)
    assert torch.isfinite(x).all()
    assert torch.equal(x, x.mT)
    assert relative_error(x, reference.sqrtm(a)) <= LIMIT[precision]
    assert relative_error(x @ x, a) <= LIMIT[precision]


@pytest.mark.parametrize("kind", DEFINITE)
@pytest.mark.parametrize("method", METHODS)
def test_inverse_square_root_inverts_the_root(kind, method):
    a = matrices(kind)
    z = inverse_sqrtm(a, method=method, precision="float64")
    assert relative_error(z, reference.inverse_sqrtm(a)) <= 1e-6
    eye = torch.eye(D, dtype=a.dtype).expand_as(a)
    assert relative_error(z @ a @ z, eye) <= 1e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("precision", "limit"), [("float32", 1e-4), ("float16", 1e-2), ("bfloat16", 5e-2)])
def test_inverse_square_root_in_low_precision(method, precision, limit):
    a = matrices("i^-1")
    assert relative_error(inverse_sqrtm(a, method=method, precision=precision), reference.inverse_sqrtm(a)) <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", ["auto", "polar", "coupled"])
def test_dtypes_are_kept(dtype, method):
    a = matrices("i^-0.5").to(dtype)
    a = (a + a.mT) / 2
    x = sqrtm(a, method=method)
    assert x.dtype == dtype
    assert relative_error(x, reference.sqrtm(a)) <= 10 * torch.finfo(dtype).eps + 1e-6


@pytest.mark.parametrize("scale", [1e-12, 1e12, 1e-280, 1e280])
@pytest.mark.parametrize("method", METHODS)
def test_any_scale(scale, method):
    a = matrices("i^-1")
    assert relative_error(sqrtm(a * scale, method=method) / scale**0.5, reference.sqrtm(a)) <= 4e-6


@pytest.mark.parametrize("function", [sqrtm, inverse_sqrtm])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 1), (2, 1)])
@pytest.mark.parametrize("d", [1, 2, 7])
def test_batches_of_every_shape(function, method, shape, d):
    x = torch.randn(*shape, d, 2 * d + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(d))
    a = x @ x.mT
    big = torch.full((*shape, 2 * d, 2 * d), float("nan"), dtype=torch.float64)
    big[..., ::2, ::2] = a
    strided = big[..., ::2, ::2]
    found = function(strided, method=method, precision="float64")
    expected = (reference.sqrtm if function is sqrtm else reference.inverse_sqrtm)(a)
    assert relative_error(found, expected) <= 1e-9
    assert torch.equal(strided, a)


@pytest.mark.parametrize("kind", [k for k in SPECTRA if k not in ("zero", "zero columns", "rank d/4")])
@pytest.mark.parametrize(
    ("precision", "limit"), [("bfloat16", 0.15), ("float16", 2e-2), ("float32", 1e-5), ("float64", 1e-12)]
)
def test_polar_factor_is_orthogonal_where_singular_values_are_resolved(kind, precision, limit):
    n = covariance(kind, D, 1) @ covariance("identity", D, 0)
    w, s, vt = torch.linalg.svd(n)
    s = s.clamp(min=2 * eager.LOWER[precision] * s[0])
    n = w * s @ vt.flip(0)
    u = polar(n, precision=precision)
    assert relative_error(u.T @ u, torch.eye(D, dtype=n.dtype)) <= limit
    assert (u * n).sum() == pytest.approx(s.sum().item(), rel=0.1 * limit)


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("precision", list(LIMIT))
@pytest.mark.parametrize("seed", range(3))
def test_polar_factor_never_blows_up(kind, precision, seed):
    n = covariance(kind, D, seed) @ covariance(kind, D, seed + 50)
    u = polar(n.to(torch.float32), precision=precision)
    assert torch.isfinite(u).all()
    assert torch.linalg.matrix_norm(u.double(), 2) <= 1.15


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (1, 6), (6, 1), (2, 3, 8, 5), (0, 4, 4), (5, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_polar_of_rectangular_matrices(shape, dtype):
    m = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    u = polar(m, precision="float64")
    assert u.dtype == dtype
    assert relative_error(u, reference.polar(m)) <= 2 * torch.finfo(dtype).eps + 1e-12


def test_polar_of_zero_is_zero_and_of_low_rank_is_a_partial_isometry():
    assert torch.equal(polar(torch.zeros(3, 4)), torch.zeros(3, 4))
    m = torch.randn(10, 2, dtype=torch.float64) @ torch.randn(2, 10, dtype=torch.float64)
    u = polar(m, precision="float64")
    assert relative_error((u * m).sum(), torch.linalg.svdvals(m).sum()) <= 1e-6


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_coupled_iteration_converges_on_well_conditioned_matrices(precision):
    a = matrices("i^-0.5")
    root, inverse, residual = newton_schulz(a, iterations=20, precision=precision)
    limit = {"float32": 1e-5, "float64": 1e-13}[precision]
    assert relative_error(root, reference.sqrtm(a)) <= limit
    assert relative_error(inverse, reference.inverse_sqrtm(a)) <= limit
    assert residual.shape == (2,)
    assert (residual <= limit).all()


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("precision", list(LIMIT))
def test_coupled_iteration_is_finite_and_says_when_it_has_not_converged(kind, precision):
    a = matrices(kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        root, inverse, residual = newton_schulz(a, iterations=40, precision=precision)
    assert torch.isfinite(root).all()
    assert torch.isfinite(inverse).all()
    unconverged = bool(
        (residual > {"bfloat16": 5e-2, "float16": 1e-2, "float32": 1e-3, "float64": 1e-8}[precision]).any()
    )
    assert unconverged == any("newton_schulz: " in str(w.message) for w in caught)
    if not unconverged:
        assert (
            relative_error(root, reference.sqrtm(a))
            <= {"bfloat16": 0.3, "float16": 0.1, "float32": 1e-2, "float64": 1e-6}[precision]
        )


def test_coupled_iteration_warns_where_rounding_wins():
    with pytest.warns(RuntimeWarning, match="have not converged after 40 iterations in bfloat16"):
        newton_schulz(covariance("i^-3", D, 0), iterations=40, precision="bfloat16")


def test_a_tolerance_that_is_missed_is_said():
    with pytest.warns(RuntimeWarning, match=r"sqrtm: reached a relative residual of .*, above tol=1e-10"):
        sqrtm(matrices("i^-1"), method="polar", precision="bfloat16", tol=1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sqrtm(matrices("i^-1"), method="eigh", tol=1e-10)
        inverse_sqrtm(matrices("i^-1"), method="eigh", tol=1e-8)


def symmetric(x: torch.Tensor) -> torch.Tensor:
    return (x + x.mT) / 2


SPREAD = {
    "spread": [1.0, 2.0, 3.0, 4.0],
    "repeated": [1.0, 1.0, 2.0, 2.0],
    "multiple of the identity": [2.0] * 4,
    "small": [1e-3, 1e-3, 1.0, 2.0],
}


def leaf(values: list[float]) -> torch.Tensor:
    q, _ = torch.linalg.qr(torch.randn(2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    return symmetric(q * torch.tensor(values, dtype=torch.float64) @ q.mT).requires_grad_()


@pytest.mark.parametrize("values", SPREAD.values(), ids=SPREAD)
@pytest.mark.parametrize("function", [sqrtm, inverse_sqrtm])
@pytest.mark.parametrize("method", ["eigh", "polar"])
def test_gradients_of_roots(values, function, method):
    a = leaf(values)
    assert torch.autograd.gradcheck(
        lambda x: function(symmetric(x), method=method, precision="float64"), a, eps=1e-6, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (3, 6), (2, 4, 3)])
def test_gradients_of_polar(shape):
    m = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: polar(x, precision="float64"), m, atol=1e-5, rtol=1e-5)


def test_gradients_of_the_coupled_iteration():
    a = leaf(SPREAD["repeated"])
    call = lambda x: newton_schulz(symmetric(x), iterations=30, precision="float64")[:2]  # noqa: E731
    assert torch.autograd.gradcheck(call, a, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["rank d/4", "zero", "zero columns", "condition 1e12", "identity"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_next_to_singular_are_finite(kind, dtype):
    a = matrices(kind).to(dtype)
    a = symmetric(a).requires_grad_()
    sqrtm(a).sum().backward()
    assert torch.isfinite(a.grad).all()
    m = matrices(kind).to(dtype).requires_grad_()
    polar(m).sum().backward()
    assert torch.isfinite(m.grad).all()


@pytest.mark.parametrize("values", SPREAD.values(), ids=SPREAD)
def test_iterated_lyapunov_solution_is_the_one_by_eigenvectors(values):
    x = leaf(values).detach()
    g = symmetric(torch.randn(2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    s = eager.lyapunov(x, g)
    assert relative_error(x @ s + s @ x, g) <= 1e-10


NULL = {
    "two null directions": [0.0, 0.0, 1.0, 2.0],
    "below rounding": [1e-9, 1e-9, 1.0, 2.0],
    "nothing": [0.0] * 4,
    "half": [0.0] * 20 + [1 / i for i in range(1, 21)],
}


@pytest.mark.parametrize("values", NULL.values(), ids=NULL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iterated_lyapunov_solution_leaves_null_directions_out(values, dtype):
    d = len(values)
    generator = torch.Generator().manual_seed(5)
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    spectrum = torch.tensor(values, dtype=torch.float64)
    g = symmetric(torch.randn(d, d, generator=generator, dtype=torch.float64))
    sums = spectrum[:, None] + spectrum
    resolved = sums > 4 * d * torch.finfo(dtype).eps * spectrum.amax()
    expected = q @ torch.where(resolved, q.T @ g @ q / sums.clamp(min=1e-30), 0.0) @ q.T
    found = eager.lyapunov(symmetric(q * spectrum @ q.T).to(dtype)[None], g.to(dtype)[None])[0]
    # If 1e-9 is above rounding, the solution is as large as 1e9, and so is the effect of rounding on it.
    condition = 1 / sums[resolved].amin() if resolved.any() else torch.tensor(1.0)
    assert (found - expected).norm() <= 20 * torch.finfo(dtype).eps * condition * expected.norm().clamp(min=1.0)


@pytest.mark.parametrize("method", ["polar", "eigh", "coupled"])
def test_autocast_changes_no_bit_of_a_result_or_gradient(method):
    a = matrices("i^-1").float()
    calls = {
        "sqrtm": lambda x: sqrtm(x, method=method),
        "inverse_sqrtm": lambda x: inverse_sqrtm(x, method=method),
        "polar": polar,
        "newton_schulz": lambda x: newton_schulz(x, iterations=12).sqrt,
    }
    for name, call in calls.items():
        results = []
        for enabled in (False, True):
            x = a.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled), warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # newton_schulz warns that it has not converged
                out = call(x)
                out.sum().backward()
            results += [(out, x.grad)]
        assert torch.equal(results[0][0], results[1][0]), name
        assert torch.equal(results[0][1], results[1][1]), name


@pytest.mark.parametrize("precision", list(LIMIT))
@pytest.mark.parametrize("scale", [1e-300, 1e300, 1e308])
def test_the_coupled_iteration_does_not_depend_on_the_scale(scale, precision):
    a = matrices("i^-0.5")
    a = a / a.abs().amax()
    root, inverse, residual = newton_schulz(a * scale, iterations=20, precision=precision)
    expected = newton_schulz(a, iterations=20, precision=precision)
    assert relative_error(root / scale**0.5, expected.sqrt) <= 1e-2
    assert relative_error(inverse * scale**0.5, expected.inverse_sqrt) <= 1e-2
    assert relative_error(sqrtm(a * scale) / scale**0.5, sqrtm(a)) <= 1e-12
    assert torch.isfinite(residual).all()


COMPILED = {
    "sqrtm": lambda x: sqrtm(x, method="polar"),
    "inverse_sqrtm": inverse_sqrtm,
    "polar": polar,
    "newton_schulz": lambda x: (lambda found: (found.sqrt, found.inverse_sqrt))(newton_schulz(x, iterations=12)),
}


@pytest.mark.parametrize("call", COMPILED.values(), ids=COMPILED)
def test_compiles_without_a_graph_break_backward_included(call):
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for function in (call, compiled):
        a = leaf(SPREAD["spread"]).detach().float().requires_grad_()
        out = function(a)
        sum(o.square().sum() * (i + 1) for i, o in enumerate(out if isinstance(out, tuple) else (out,))).backward()
        results.append(a.grad)
    assert torch.equal(*results)


def test_compiled_code_serves_every_number_of_iterations():
    graphs = []
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x, n: sqrtm(x, method="polar", iterations=n), fullgraph=True, backend=lambda g, _: graphs.append(g) or g
    )
    a = leaf(SPREAD["spread"]).detach()
    for n in (5, 6, 7, 8):
        assert torch.equal(compiled(a, n), sqrtm(a, method="polar", iterations=n))
    assert len(graphs) <= 2, "one graph for the first number, one for all others"


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        ("root", ("sqrt", "eigh", "float64", None, None, "eager")),
        ("root", ("inverse", "polar", "float64", None, 1e-6, "eager")),
        ("polar", ("float64", None, "eager")),
        ("newton_schulz", (20, "float64", "eager")),
    ],
)
def test_operators_pass_opcheck(operator, arguments):
    a = leaf(SPREAD["spread"])
    result = torch.library.opcheck(getattr(torch.ops.mir_kernels, operator).default, (a, *arguments))
    assert set(result.values()) == {"SUCCESS"}


EYE = torch.eye(3)
INDEFINITE = torch.tensor([[1.0, 2.0], [2.0, 1.0]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sqrtm([[1.0]]), TypeError, "a: expected a torch.Tensor"),
        (lambda: sqrtm(EYE.int()), TypeError, "a: expected one of the dtypes float32, .* got int32"),
        (lambda: sqrtm(torch.zeros(2, 3)), ValueError, r"a: expected square matrices \(..., d, d\)"),
        (lambda: sqrtm(EYE / 0), ValueError, "a: expected finite values"),
        (lambda: sqrtm(EYE + EYE.roll(1, 0)), ValueError, "a: expected symmetric matrices"),
        (lambda: sqrtm(-EYE), ValueError, "a: expected positive semi-definite matrices"),
        (lambda: sqrtm(EYE, method="fast"), ValueError, "method: expected one of"),
        (lambda: sqrtm(EYE, precision="half"), ValueError, "precision: expected one of"),
        (lambda: sqrtm(EYE, iterations=0), ValueError, "iterations: expected a positive number"),
        (lambda: sqrtm(EYE, backend="cuda"), ValueError, "backend: sqrtm has no backend 'cuda'"),
        (lambda: sqrtm(EYE, backend="triton", method="eigh"), RuntimeError, "'triton' of sqrtm does not support eigh"),
        (lambda: polar(EYE, backend="triton", precision="float64"), RuntimeError, "polar does not support float64"),
        (
            lambda: newton_schulz(EYE, iterations=1, backend="triton"),
            ValueError,
            "newton_schulz has no backend 'triton'",
        ),
        (lambda: sqrtm(INDEFINITE), ValueError, "a: expected positive semi-definite .* an eigenvalue of -0.333 times"),
        (
            lambda: sqrtm(INDEFINITE, method="polar"),
            ValueError,
            "a: expected positive semi-definite .* an eigenvalue of -",
        ),
        (lambda: inverse_sqrtm(EYE - EYE), ValueError, "a: expected positive definite matrices, got 1 of 1"),
        (lambda: inverse_sqrtm(EYE - EYE, method="polar"), ValueError, "a: expected positive definite .* got 1 of 1"),
        (lambda: polar(torch.zeros(3)), ValueError, r"m: expected matrices \(..., m, n\)"),
        (lambda: polar(EYE / 0), ValueError, "m: expected finite values"),
        (lambda: newton_schulz(EYE, iterations=0), ValueError, "iterations: expected a positive number"),
    ],
)
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_eager_calls_and_their_gradients_load_no_compiler():
    """The first call of a custom_op imports torch._dynamo, which takes seconds."""
    program = """
import sys, torch
from mir_kernels.ops.sqrtm import inverse_sqrtm, newton_schulz, polar, sqrtm
a = 2 * torch.eye(3)
calls = (sqrtm, inverse_sqrtm, polar, lambda x: newton_schulz(x, iterations=12).sqrt)
for call in calls:
    call(a)
    x = a.clone().requires_grad_()
    call(x).sum().backward()
    assert x.grad is not None
assert "torch._dynamo" not in sys.modules, "the compiler was loaded"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
