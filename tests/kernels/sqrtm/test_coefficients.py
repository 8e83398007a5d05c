"""The polynomial steps: minimax by equioscillation, and their composition maps every singular value to 1."""

import numpy as np
import pytest

from mir_kernels.ops.sqrtm import coefficients, eager
from mir_kernels.ops.sqrtm.eager import LOWER, SAFETY, TARGET


@pytest.mark.parametrize(("low", "high"), [(1e-6, 1.0), (1e-3, 1.0), (0.1, 1.9), (0.5, 1.5), (0.9, 1.1)])
def test_error_of_a_minimax_step_equioscillates_four_times(low, high):
    step, error = coefficients.minimax(low, high)
    x = np.linspace(low, high, 200_001)
    deviation = coefficients.evaluate(step, x) - 1
    assert np.abs(deviation).max() == pytest.approx(error, rel=1e-6, abs=1e-12)
    touched = deviation[np.abs(deviation) > error * (1 - 1e-4)]
    assert np.count_nonzero(np.diff(np.sign(touched))) == 3


def test_minimax_step_is_no_worse_than_any_perturbed_step():
    (a, b, c), error = coefficients.minimax(1e-2, 1.0)
    x = np.linspace(1e-2, 1.0, 20_001)
    generator = np.random.default_rng(0)
    for _ in range(200):
        da, db, dc = generator.normal(size=3) * 1e-3
        assert np.abs(coefficients.evaluate((a + da, b + db, c + dc), x) - 1).max() >= error * (1 - 1e-9)


@pytest.mark.parametrize("precision", ["bfloat16", "float32", "float64"])
def test_schedule_takes_the_whole_interval_to_one(precision):
    x = np.concatenate([np.geomspace(LOWER[precision], 1.0, 20_001), np.linspace(0.5, 1.0, 20_001)])
    for step in coefficients.schedule(LOWER[precision], SAFETY[precision], TARGET[precision]):
        x = coefficients.evaluate(step, x)
        assert x.min() > 0
        assert x.max() < 2.1
    assert np.abs(x - 1).max() < 2 * max(TARGET[precision], 1e-15)


@pytest.mark.parametrize("precision", ["bfloat16", "float32", "float64"])
def test_schedule_survives_singular_values_pushed_out_by_its_safety_factor(precision):
    x = np.linspace(1e-3, 1.0, 20_001)
    for step in coefficients.schedule(LOWER[precision], SAFETY[precision], TARGET[precision]):
        x = coefficients.evaluate(step, np.append(x, x.max() * SAFETY[precision]))
        assert np.abs(x).max() < 2.2
    assert np.abs(x).max() < 1.1


def test_wider_intervals_take_more_steps():
    counts = [len(coefficients.schedule(lower, 1.001, 1e-6)) for lower in (1e-1, 1e-3, 1e-6, 1e-9)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] <= 18


@pytest.mark.parametrize("bad", [(0.0, 1.0, 1e-3), (1.0, 1.0, 1e-3), (0.1, 0.9, 1e-3), (0.1, 1.0, 0.0)])
def test_schedule_refuses_intervals_it_cannot_map(bad):
    with pytest.raises(ValueError, match="schedule: expected"):
        coefficients.schedule(*bad)


@pytest.mark.parametrize("precision", list(eager.DTYPES))
def test_no_entry_of_a_step_comes_near_the_end_of_float16_times_its_scale(precision):
    """The kernels split float32 into float16 halves after multiplying by 2^10: entries must stay below 63."""
    for a, b, c in eager.steps_for(precision, lower=1e-12):
        for s in (1.1**2 * i / 1000 for i in range(1001)):
            assert abs(b * s + c * s * s) < 32  # an eigenvalue, hence an entry, of b G + c G^2
        assert abs(a) < 32
