"""Float64 by 8-bit digits: exact where float64 is exact, and always within the error bound that the proofs rest on."""

import itertools
from fractions import Fraction

import pytest
import torch

from kernels.covariances import covariance
from mir_kernels import trace_sqrt_product
from mir_kernels.ops.frechet import trace_sqrt_report
from mir_kernels.ops.frechet.report import TOLERANCE
from mir_kernels.ops.sqrtm import factor, float64
from mir_kernels.ops.sqrtm.rounding import contract, gamma


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact_product(x, y):
    rows, columns = ([[Fraction(v) for v in row] for row in t.tolist()] for t in (x, y.mT))
    return [[sum(a * b for a, b in zip(row, column, strict=True)) for column in columns] for row in rows]


def squares(vectors):
    return sum(Fraction(v) ** 2 for v in itertools.chain.from_iterable(vectors))


def worst_digits(m, k, seed):
    """Values halfway between two last digits, as large as the power of two of their row allows."""
    signs = normal(m, k, seed=seed).sign()
    return signs * (2.0 - 2.0**-52)


CASES = {
    "normal": lambda: (normal(5, 40), normal(40, 6, seed=1)),
    "rows of every size": lambda: (
        normal(5, 40) * 10.0 ** torch.tensor([-150.0, -8, 0, 8, 140])[:, None].double(),
        normal(40, 6, seed=1) * 10.0 ** torch.tensor([-150.0, -8, 0, 3, 8, 150]).double(),
    ),
    "entries of every size": lambda: (normal(5, 40) * 10 ** (4 * normal(5, 40, seed=2)), normal(40, 6, seed=1)),
    "one entry a row": lambda: (torch.eye(6, dtype=torch.float64) / 3, torch.eye(6, dtype=torch.float64) / 7),
    "the shortest dot product": lambda: (worst_digits(3, 2, 0), worst_digits(2, 4, 1)),
    "worst digits": lambda: (worst_digits(4, 50, 0), worst_digits(50, 4, 1)),
    "cancellation": lambda: (normal(3, 30), torch.linalg.svd(normal(3, 30)).Vh[3:].mT.contiguous()),
    "zero rows": lambda: (normal(5, 40) * (torch.arange(5) % 2)[:, None], normal(40, 6) * (torch.arange(6) % 3)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_error_is_within_what_the_proofs_take_from_every_product(case):
    x, y = CASES[case]()
    found, exact = float64.split_matmul(x, y), exact_product(x, y)
    columns = list(zip(*exact, strict=True))
    unit = Fraction(gamma(x.shape[1]))
    of_x = squares(x.tolist())
    for j, column in enumerate(columns):
        error = sum((Fraction(found[i, j].item()) - v) ** 2 for i, v in enumerate(column))
        assert error <= unit**2 * of_x * squares([y[:, j].tolist()]), j


def test_digits_give_every_bit_of_a_row_whose_values_are_alike():
    x = normal(7, 33) * 2.0 ** torch.tensor([-900.0, -60, -1, 0, 1, 60, 900])[:, None].double()
    x = torch.where(x.abs() < x.abs().amax(1, keepdim=True) * 2**-9, 0.0, x)  # 53 bits end above the last digit
    digit, exponent = float64.digits(x)
    assert digit.abs().max() <= 64
    for i, row in enumerate(x.tolist()):
        for j, value in enumerate(row):
            places = sum(Fraction(int(q), 128 ** (p + 1)) for p, q in enumerate(digit[i, :, j].tolist()))
            assert places * Fraction(2) ** int(exponent[i]) == Fraction(value)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 40, 5), (33, 17, 40), (64, 300, 48)])
def test_integers_multiply_as_in_float64_to_the_bit(shape):
    m, k, n = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**20), 2**20, (m, k), generator=generator).double()
    y = torch.randint(-(2**20), 2**20, (k, n), generator=generator).double()
    assert torch.equal(float64.split_matmul(x, y), x @ y)


def test_products_of_a_grid_are_exact_as_the_residual_of_a_factor_needs():
    c = (normal(40, 40) / 8 * 2**26).round() / 2**26
    exact = exact_product(c, c.mT)
    found = float64.split_matmul(c, c.mT)
    assert all(Fraction(found[i, j].item()) == exact[i][j] for i in range(40) for j in range(40))


def test_long_dot_products_are_cut(monkeypatch):
    x, y = normal(20, 150), normal(150, 24, seed=1)
    whole = float64.split_matmul(x, y)
    monkeypatch.setattr(float64, "LONGEST", 64)
    torch.testing.assert_close(float64.split_matmul(x, y), whole, rtol=1e-14, atol=1e-14)
    assert float64.PARTS * (1 << 15) * 64**2 < 2**31


def test_batches_broadcast_and_what_is_not_finite_shows_in_its_row():
    x, y = normal(3, 20, 30), normal(30, 40, seed=1)
    found = float64.split_matmul(x, y)
    torch.testing.assert_close(found, x @ y, rtol=1e-13, atol=1e-13)
    assert float64.split_matmul(x[:0], y).shape == (0, 20, 40)
    x[1, 4, 7] = float("inf")
    spoiled = float64.split_matmul(x, y)
    assert spoiled[1, 4].isnan().all()
    spoiled[1, 4] = found[1, 4]
    assert torch.equal(spoiled, found)


@pytest.mark.parametrize("kind", ["i^-1", "i^-3"])
def test_factors_and_solutions_in_blocks_are_as_good_as_whole_ones(kind, monkeypatch):
    monkeypatch.setattr(float64, "BLOCK", 32)
    h = torch.stack([factor.equilibrate(covariance(kind, 100, seed)).h for seed in range(2)])
    n = normal(2, 70, 100)
    with float64.split_products():
        lower, failed = float64.cholesky(h)
        x = float64.solve_right(lower.mT, n)
    assert not failed.any()
    assert torch.equal(lower, lower.tril())
    whole = torch.linalg.cholesky(h)
    residuals = [(h - c @ c.mT).norm() / h.norm() for c in (lower, whole)]
    assert residuals[0] <= 2 * residuals[1] + 1e-16
    plain = torch.linalg.solve_triangular(lower.mT, n, upper=True, left=False)
    left_over = [(n - z @ lower.mT).norm() / n.norm() for z in (x, plain)]
    assert left_over[0] <= 4 * left_over[1] + 1e-16


def test_a_matrix_that_is_not_definite_fails_alone(monkeypatch):
    monkeypatch.setattr(float64, "BLOCK", 32)
    h = torch.eye(80, dtype=torch.float64).repeat(3, 1, 1)
    h[1, 60, 60] = -1.0
    with float64.split_products():
        lower, failed = float64.cholesky(h)
    assert failed.tolist() == [False, True, False]
    assert torch.equal(lower[::2], h[::2])


@pytest.mark.parametrize("kind", ["i^-0.5", "i^-1", "i^-3", "rank d/4", "one direction 1e6", "condition 1e12"])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_traces_keep_their_promise_and_say_that_their_products_were_split(kind, precision, monkeypatch):
    monkeypatch.setattr(float64, "BLOCK", 32)
    a, b = covariance(kind, 90, 0)[None], covariance(kind, 90, 1)[None]
    truth = trace_sqrt_report(a, b, precision="float64", backend="reference").value
    with float64.split_products():
        report = trace_sqrt_report(a, b, precision=precision, backend="eager")
    assert ((report.value - truth).abs() <= (report.error + 1e-12) * truth).all()
    plain = trace_sqrt_report(a, b, precision=precision, backend="eager")
    assert (report.error <= torch.maximum(2 * plain.error, torch.tensor(TOLERANCE[precision]))).all()
    assert report.path[0] == plain.path[0].replace("cholesky", "split cholesky")


@pytest.mark.parametrize("kind", ["i^-1", "i^-2", "rank d/4"])
def test_proved_bounds_stay_true_and_close(kind):
    a, b = covariance(kind, 60, 0), covariance(kind, 60, 1)
    plain = trace_sqrt_product(a, b, precision="float32", bounds=True, backend="eager")
    with float64.split_products():
        found = trace_sqrt_product(a, b, precision="float32", bounds=True, backend="eager")
    assert plain.lower <= found.upper
    assert found.lower <= plain.upper
    assert found.upper - found.lower <= 2 * (plain.upper - plain.lower) + 1e-12 * plain.value


def test_the_last_polar_step_proves_its_norm_with_split_products():
    q = torch.linalg.qr(normal(2, 60, 40)).Q
    with float64.split_products():
        u, norm = contract(q + 1e-7 * normal(2, 60, 40, seed=1))
    assert (torch.linalg.matrix_norm(u, 2) <= norm).all()
    assert (norm <= 1 + 1e-9).all()


def test_products_are_split_where_a_measurement_says_so_or_the_environment(monkeypatch):
    cpu = torch.device("cpu")
    assert not float64.is_split(cpu)
    monkeypatch.setenv(float64.VARIABLE, "split")
    assert float64.is_split(cpu)
    small, large = normal(40, 40), normal(260, 260)
    assert torch.equal(float64.matmul(small, small), small @ small)  # too small for splitting to pay off
    assert torch.equal(float64.matmul(large, large), float64.split_matmul(large, large))
    with float64.split_products(False):
        assert not float64.is_split(cpu)
    monkeypatch.setenv(float64.VARIABLE, "sometimes")
    with pytest.raises(ValueError, match="MIR_FLOAT64: expected 'native', 'split' or 'measured', got 'sometimes'"):
        float64.is_split(cpu)


def test_a_measurement_is_made_once_a_device_and_never_in_a_graph(monkeypatch):
    asked = []
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(float64, "_split_is_faster", lambda device: asked.append(device) or True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not float64.is_split(cuda)
    assert asked == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert float64.is_split(cuda)
    assert asked == [cuda]


def test_the_faster_of_both_products_is_taken_and_a_device_without_integers_says_so(monkeypatch):
    monkeypatch.setattr(float64, "PROBE", 32)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(float64, "_seconds", lambda product, x: 1.0 if product is torch.matmul else 0.5)
    assert float64._split_is_faster.__wrapped__(torch.device("cpu"))
    monkeypatch.setattr(float64, "_seconds", lambda product, x: 1.0 if product is torch.matmul else 1.5)
    assert not float64._split_is_faster.__wrapped__(torch.device("cpu"))

    def refused(x, y):
        raise RuntimeError("no int8 here")

    monkeypatch.undo()
    monkeypatch.setattr(float64, "PROBE", 32)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(float64, "split_matmul", refused)
    with pytest.warns(RuntimeWarning, match="float64 products are not split on cpu .*: no int8 here"):
        assert not float64._split_is_faster.__wrapped__(torch.device("cpu"))


@pytest.mark.gpu
def test_a_gpu_splits_as_a_cpu_does():
    x, y = normal(300, 500), normal(500, 290, seed=1)
    assert torch.equal(float64.split_matmul(x.cuda(), y.cuda()).cpu(), float64.split_matmul(x, y))
    assert isinstance(float64.is_split(torch.device("cuda")), bool)
