"""Traces of inverses of shifted band matrices: the compiled CPU kernel against torch.linalg."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("native_module")


def band_of(t: torch.Tensor, width: int) -> torch.Tensor:
    """The band storage (d, width + 1) with entries [j, r] = T[j + r, j]."""
    band = t.new_zeros(t.shape[0], width + 1)
    for r in range(width + 1):
        band[: t.shape[0] - r, r] = t.diagonal(-r)
    return band


def inverse_traces(t: torch.Tensor, width: int, shifts: list[float]) -> torch.Tensor:
    from mir_kernels.ops.frechet import native

    return native.inverse_traces(band_of(t, width), torch.tensor(shifts, dtype=t.dtype))


def definite(d: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(d)
    lower = torch.randn(d, d, generator=generator, dtype=torch.float64).tril().triu(-width)
    return lower @ lower.T + torch.eye(d)


@pytest.mark.parametrize("count", [1, 3, 8, 19])
@pytest.mark.parametrize(
    ("d", "width"), [(1, 0), (2, 1), (5, 4), (7, 2), (9, 0), (40, 7), (41, 8), (150, 64), (65, 64)]
)
def test_traces_of_inverses_are_those_of_torch(d, width, count):
    t = definite(d, width)
    shifts = [0.0, *torch.logspace(-6, 6, count, dtype=torch.float64).tolist()][:count]
    expected = [torch.linalg.inv(t + s * torch.eye(d).double()).trace().item() for s in shifts]
    assert inverse_traces(t, width, shifts).tolist() == pytest.approx(expected, rel=1e-11)


def test_more_shifts_than_fit_one_thread_give_the_same_bits_as_one_at_a_time():
    t = definite(300, 20)
    shifts = torch.linspace(0, 5, 40, dtype=torch.float64).tolist()
    assert inverse_traces(t, 20, shifts).tolist() == [inverse_traces(t, 20, [s]).item() for s in shifts]


def test_a_pivot_that_is_not_positive_makes_nan_of_its_own_shift_only():
    t = torch.diag(torch.tensor([3.0, 1.0, 0.0, 2.0], dtype=torch.float64))
    found = inverse_traces(t, 1, [0.0, 1.0, -0.5, 1e-3])
    assert found.isnan().tolist() == [True, False, True, False]
    assert found[1].item() == pytest.approx(1 / 4 + 1 / 2 + 1 + 1 / 3)


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_traces_scale_with_the_matrix(scale):
    t = definite(50, 6)
    found = inverse_traces(t * scale, 6, [0.0, scale])
    assert (found * scale).tolist() == pytest.approx(inverse_traces(t, 6, [0.0, 1.0]).tolist(), rel=1e-12)
