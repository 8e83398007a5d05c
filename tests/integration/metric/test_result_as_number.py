"""A result behaves like a number in arithmetic, rounding, ordering, formatting and arrays; its repr is one line."""

import math
import numbers
import statistics

import numpy as np
import pytest
import torch

from modality_integration import LayerTerms, MIRResult, mir


def read(value=3.3740123, layers=1, **options):
    """A result with the MIR `value`, as read from JSON."""
    terms = [LayerTerms(10.0**value / layers, 0.0, 0.0, 0.0)] * layers
    counts = {"vision": [2] * layers, "text": [2] * layers}
    return MIRResult(terms, [1.0] * layers, counts, counts, **options)


def computed(seed=0):
    """A result computed by `mir`."""
    generator = torch.Generator().manual_seed(seed)
    return mir(*([torch.randn(40 + n, 4, generator=generator) for _ in range(3)] for n in (0, 5)))


NUMBERS = {
    "float": float,
    "int": int,
    "round": round,
    "round to digits": lambda r: round(r, 3),
    "round to tens": lambda r: round(r, -1),
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "trunc": math.trunc,
    "complex": complex,
    "format": lambda r: f"{r:.3f} {r:+.2e} {r:8.1f}",
    "percent": lambda r: "%.3f" % r,  # noqa: UP031
    "negative": lambda r: -r,
    "positive": lambda r: +r,
    "plus": lambda r: r + 1,
    "to a number": lambda r: 1.5 + r,
    "minus": lambda r: r - 0.5,
    "from a number": lambda r: 4 - r,
    "times": lambda r: r * 2,
    "of a number": lambda r: 2 * r,
    "over": lambda r: r / 2,
    "under": lambda r: 1 / r,
    "to the power": lambda r: r**2,
    "exponent": lambda r: 10**r,
    "array": lambda r: np.asarray(r).item(),
    "numpy scalar": np.float64,
    "mean": lambda r: np.mean([r, r]),
    "fmean": lambda r: statistics.fmean([r, r, r]),
    "sum": lambda r: sum([r, r]),
    "fsum": lambda r: math.fsum([r, r]),
    "torch": lambda r: torch.tensor([r, r], dtype=torch.float64)[1].item(),
    "difference": lambda r: r - r,
}


@pytest.mark.parametrize("made", [read(), read(-1.25), computed()], ids=["read", "below 0", "computed"])
@pytest.mark.parametrize("operation", NUMBERS)
def test_what_a_float_does_a_result_does(made, operation):
    expected = NUMBERS[operation](made.value)
    found = NUMBERS[operation](made)
    assert found == expected
    assert type(found) is type(expected) or isinstance(made, torch.Tensor) or isinstance(found, np.floating)


@pytest.mark.parametrize("made", [read(), computed()], ids=["read", "computed"])
def test_numbers_are_compared_by_value(made):
    assert isinstance(made, numbers.Real)
    assert made == made.value
    assert made.value == made
    assert made != made.value + 1
    assert made < made.value + 1
    assert made.value - 1 < made
    assert math.isclose(made, made.value)
    assert made == pytest.approx(made.value)
    assert pytest.approx(made.value + 1e-12) == made
    assert made != pytest.approx(made.value + 1)
    assert np.isclose(made, made.value)


def test_a_result_is_no_other_result_of_its_value():
    assert read(layers=1) != read(layers=2)
    assert read(layers=2).value == pytest.approx(read(layers=1).value)


@pytest.mark.parametrize("dtype", [None, float, np.float32])
def test_arrays_of_results_are_arrays_of_their_values(dtype):
    results = [read(), computed(1), read(2.0)]
    array = np.asarray(results, dtype=dtype)
    assert array.dtype == (dtype or np.float64)
    assert array.shape == (3,)
    np.testing.assert_allclose(array, [r.value for r in results], rtol=1e-6)
    assert np.argmin(array) == results.index(min(results))
    with pytest.raises(ValueError, match="copy: a result has no array"):
        np.array(read(), copy=False)


def test_results_read_and_computed_go_together():
    a, b = read(), computed()
    assert float(a - b) == -float(b - a) == a.value - b.value
    assert sorted([a, b]) == sorted([b, a])


def test_words_are_no_operands():
    for operation in (lambda r: r + "1", lambda r: r * "2", lambda r: r < "1"):
        with pytest.raises(TypeError):
            operation(read())
    assert read() != "3.374"


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (read(), "<MIRResult 3.3740, 1 layer>"),
        (read(layers=24, notes=["one"]), "<MIRResult 3.3740, 24 layers, 1 note>"),
        (read(notes=["one", "two"], left_out=[[100.0, 101.0]]), "<MIRResult 3.3740 +- 0.0022, 1 layer, 2 notes>"),
        (read(-math.inf), "<MIRResult -inf, 1 layer>"),
    ],
)
def test_a_result_shows_itself_in_one_line(made, text):
    assert repr(made) == text
    assert repr([made]) == f"[{text}]"
    assert f"{made!r}" == text
    assert repr(computed()) == f"<MIRTensor {computed().value:.4f}, 3 layers>"
