"""The fused multiply-add that replaces the one of the interpreter of Triton 3.4 to 3.6."""

from fractions import Fraction

import pytest

pytest.importorskip("triton")

import numpy as np

from mir_kernels import _interpreter


def nearest(exact):
    """The float32 nearest to a fraction, ties to even: the closest among the neighbours of its rounded value."""
    middle = np.float32(float(exact))
    around = [np.nextafter(middle, np.float32(end)) for end in (-np.inf, np.inf)]
    return min((middle, *around), key=lambda v: (abs(Fraction(float(v)) - exact), int(v.view(np.int32)) & 1))


def cases():
    """Random numbers, cancellation, subnormal results, and sums almost halfway between two float32 numbers."""
    rng = np.random.default_rng(0)
    found = list((rng.standard_normal((3000, 3)) * 10.0 ** rng.integers(-6, 6, (3000, 3))).astype(np.float32))
    found += [np.float32((a, b, -a * b)) for a, b in rng.standard_normal((500, 2)).astype(np.float32)]
    found += [np.float32((a * 2.0**-70, b * 2.0**-70, 2.0**-149)) for a, b in rng.standard_normal((200, 2))]
    one = 2.0**-23  # (1 + one) (1 - one) is 2^-46 below 1, which float64 cannot distinguish from 1 near 2^24
    found += [np.float32((1 + one, sign * (1 - one), 2.0**24 + z)) for sign in (1, -1) for z in (0, 2, 4)]
    return np.array(found)


def test_a_float32_product_is_added_with_one_rounding():
    x, y, z = cases().T
    found = _interpreter.fma(x, y, z)
    wanted = [nearest(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))) for a, b, c in zip(x, y, z, strict=True)]  # fmt: skip  # noqa: E501
    assert found.dtype == np.float32
    assert np.array_equal(found, np.array(wanted))
    twice = np.multiply(x, y, dtype=np.float64) + z  # some cases need rounding to odd
    assert not np.array_equal(twice.astype(np.float32), found)


def test_infinities_and_nans_go_through_and_other_dtypes_are_left_to_numpy():
    big, inf, nan = np.float32(3e38), np.float32(np.inf), np.float32(np.nan)
    x, y, z = (
        np.array(t) for t in ((big, inf, inf, nan, big), (big, big, -inf, big, big), (-big, big, inf, big, -inf))
    )
    assert np.array_equal(_interpreter.fma(x, y, z), np.float32((inf, inf, nan, nan, -inf)), equal_nan=True)
    assert _interpreter.fma(x.astype(np.float64), np.float64(2), np.float64(1)).dtype == np.float64
