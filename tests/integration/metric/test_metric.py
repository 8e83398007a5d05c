"""mir() of features in memory: against float64 numpy and scipy, its invariances, and its errors."""

import math

import numpy as np
import pytest
import torch

from integration import mir_oracle
from mir_kernels.ops.frechet.report import TraceReport
from mir_kernels.ops.moments.launch import STREAMING_MOMENTS
from modality_integration import mir
from modality_integration.metric import distance, functional


def features(n, d, seed, *, decay=1.0, shift=0.0, dtype=torch.float32, tails=True):
    """Tokens with a decaying spectrum in a random basis and heavy-tailed norms."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(d, d)))[0] if d <= 256 else np.eye(d)
    out = rng.normal(size=(n, d)) * np.arange(1, d + 1) ** -decay @ basis + shift * rng.normal(size=d)
    if tails:
        out *= np.exp(0.4 * rng.standard_t(4, size=(n, 1)))
    return torch.from_numpy(out).to(dtype)


def pair(n, m, d, **options):
    return features(n, d, 1, **options), features(m, d, 2, decay=0.8, shift=0.3)


@pytest.mark.parametrize("rule", ["median", "remove", "none"])
@pytest.mark.parametrize(
    ("n", "m", "d", "how"),
    [(400, 300, 64, "sqrtm"), (90, 400, 128, "eigh"), (60, 50, 200, "eigh"), (400, 350, 129, "sqrtm")],
)
def test_every_layer_is_the_published_definition_in_float64(rule, n, m, d, how):
    vision, text = zip(*(pair(n + 10 * k, m - 5 * k, d) for k in range(2)), strict=True)
    result = mir(list(vision), list(text), outliers=rule)
    expected = [mir_oracle.distance(v, t, rule=rule, how=how) for v, t in zip(vision, text, strict=True)]
    assert result.per_layer == pytest.approx(expected, rel=1e-6)
    assert result.value == pytest.approx(math.log10(sum(expected)), abs=1e-6)
    for side, layers in (("vision", vision), ("text", text)):
        out = [0 if rule == "none" else int(mir_oracle.outliers(x.double().numpy()).sum()) for x in layers]
        assert result.removed[side] == out
        assert result.kept[side] == [len(x) - o for x, o in zip(layers, out, strict=True)]
    assert rule == "none" or sum(result.removed["vision"]) > 0
    assert result.notes == []


@pytest.mark.parametrize(("n", "m"), [(1500, 1300), (300, 1200)])
def test_every_layer_is_the_published_definition_at_a_thousand_dimensions(n, m):
    vision, text = pair(n, m, 1024)
    result = mir([vision], [text], outliers="median")
    assert result.per_layer == pytest.approx([mir_oracle.distance(vision, text, rule="median", how="eigh")], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_features_of_every_dtype_are_taken_as_they_are(dtype):
    vision, text = pair(300, 250, 48)
    vision, text = vision.to(dtype), text.to(dtype)
    before = vision.clone()
    result = mir([vision], [text], outliers="median")
    expected = mir_oracle.distance(vision.double(), text.double(), rule="median")
    assert result.per_layer == pytest.approx([expected], rel=1e-6)
    assert torch.equal(vision, before)


def test_without_normalisation_alpha_is_one():
    vision, text = pair(300, 250, 32)
    result = mir([vision], [text], normalize=False)
    assert result.alpha == [1.0]
    assert result.per_layer == pytest.approx([mir_oracle.distance(vision, text, normalize=False)], rel=1e-6)


def test_alpha_counts_all_text_tokens_outliers_included():
    vision, text = pair(300, 250, 32)
    text[17] *= 1000
    result = mir([vision], [text])
    assert result.removed["text"] == [1]
    assert result.alpha[0] == pytest.approx(250 / np.linalg.norm(text.double(), axis=1).sum(), rel=1e-6)


@pytest.mark.parametrize("n", [500, 40])
@pytest.mark.parametrize("rule", ["remove", "median", "none"])
def test_identical_inputs_are_at_distance_zero(n, rule):
    same = features(n, 64, 5)
    result = mir([same, same * 3], [same, same * 3], outliers=rule)
    for value, terms in zip(result.per_layer, result.terms, strict=True):
        assert 0.0 <= value <= 1e-9 * (terms.trace_vision + terms.trace_text)


def test_a_sum_of_zeros_is_minus_infinity_and_the_result_says_so():
    same = torch.eye(3).repeat(4, 1)
    result = mir([same], [same], bounds=True)
    assert result.per_layer == [0.0]
    assert result.value == -math.inf
    assert any("-inf" in note for note in result.notes)


@pytest.mark.parametrize("scale", [1e-12, 0.37, 1e12])
def test_value_does_not_change_when_all_features_are_scaled(scale):
    vision, text = pair(300, 280, 40)
    expected = mir([vision.double()], [text.double()])
    result = mir([vision.double() * scale], [text.double() * scale])
    assert result.value == pytest.approx(expected.value, abs=1e-9)
    assert result.removed == expected.removed


def test_value_does_not_change_when_tokens_and_coordinates_are_permuted():
    vision, text = pair(300, 280, 40)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(40, generator=generator)
    permuted = [x[torch.randperm(len(x), generator=generator)][:, order] for x in (vision, text)]
    assert mir([permuted[0]], [permuted[1]]).value == pytest.approx(mir([vision], [text]).value, abs=1e-10)


def test_massive_activations_are_removed_and_survived_when_kept():
    vision, text = pair(400, 300, 64)
    clean = mir([vision], [text])
    massive = torch.cat([vision, 1000 * vision[:1]])
    removed = mir([massive], [text])
    assert removed.kept["vision"][0] <= 400
    assert removed.value != clean.value  # the massive token widens the limits for the others
    kept = mir([massive], [text], outliers="none")
    assert kept.per_layer == pytest.approx([mir_oracle.distance(massive, text, rule="none", how="eigh")], rel=1e-6)


def test_constant_columns_are_survived():
    vision, text = pair(400, 300, 64)
    vision[:, 5] = text[:, 5] = 2.0
    vision[:, 9] = 0.0
    result = mir([vision], [text])
    assert result.per_layer == pytest.approx([mir_oracle.distance(vision, text, how="eigh")], rel=1e-6)


@pytest.fixture
def roots(monkeypatch):
    """Records every root call: the shape of its input and its options."""
    calls = []

    def recording(take):
        def recorded(a, b, **options):
            calls.append((tuple(a.shape), options))
            return take(a, b, **options)

        return recorded

    for name in ("trace_sqrt_product", "trace_sqrt_report"):
        monkeypatch.setattr(distance, name, recording(getattr(distance, name)))
    return calls


@pytest.mark.parametrize("bounds", [False, True])
def test_roots_of_layers_of_one_size_are_taken_by_one_call_where_that_is_faster(bounds, roots, monkeypatch):
    sizes = [40, 40, 24, 40, 24]
    vision, text = zip(*(pair(300 + d, 250, d) for d in sizes), strict=True)
    expected = mir(list(vision), list(text), bounds=bounds)
    assert [shape for shape, _ in roots] == [(d, d) for d in sizes]  # on a CPU
    roots.clear()
    monkeypatch.setattr(functional, "layers_together", lambda hidden_size, device: 4)
    together = mir(list(vision), list(text), bounds=bounds)
    assert [shape for shape, _ in roots] == [(3, 40, 40), (24, 24), (24, 24)]
    assert together.per_layer == pytest.approx(expected.per_layer, rel=1e-12)
    assert together.lower == expected.lower if not bounds else together.lower == pytest.approx(expected.lower, rel=1e-9)


def test_a_layer_whose_root_cannot_be_taken_is_named_among_those_taken_together(monkeypatch):
    def refuses(a, b, **options):
        matrices = a.reshape(-1, *a.shape[-2:])
        if (matrices[:, 0, 0] > 1e3).any():
            raise ValueError("too large")
        ones = matrices.new_ones(a.shape[:-2])
        return TraceReport(ones, 0 * ones, ("cholesky",) * len(matrices))

    monkeypatch.setattr(distance, "trace_sqrt_report", refuses)
    monkeypatch.setattr(functional, "layers_together", lambda hidden_size, device: 4)
    vision, text = pair(300, 250, 24)
    with pytest.raises(ValueError, match=r"layer 2: no square root of its covariances exists \(too large\)"):
        mir([vision, 1000 * vision, vision], [text, text, text])


def test_the_root_takes_the_backend_where_it_has_it_and_the_precision_asked_for(roots):
    vision, text = pair(300, 250, 24)
    asked = [None, "eager"] + ["native"] * (STREAMING_MOMENTS.reason("native", torch.device("cpu")) is None)
    values = [mir([vision], [text], backend=backend).value for backend in asked]
    assert [options["backend"] for _, options in roots] == [None, "eager", None][: len(asked)]
    assert values == pytest.approx([values[0]] * len(asked), abs=1e-7)
    assert {options["precision"] for _, options in roots} == {"float32"}
    mir([vision], [text], sqrt_precision="float64")
    assert roots[-1][1]["precision"] == "float64"
    assert distance.layers_together(1024, torch.device("cuda")) == 16
    assert distance.layers_together(8192, torch.device("cuda")) == 1


@pytest.mark.parametrize(("n", "m"), [(400, 300), (30, 300)])
def test_bounds_hold_the_true_value(n, m):
    vision, text = pair(n, m, 64)
    result = mir([vision, 2 * vision], [text, text], bounds=True)
    truth = mir_oracle.mir([vision, 2 * vision], [text, text], how="eigh")
    assert result.lower <= truth <= result.upper
    assert result.lower <= result.value <= result.upper
    assert result.upper - result.lower < 1e-3
    plain = mir([vision], [text])
    assert plain.lower is None
    assert plain.upper is None


def test_features_with_gradients_and_strides_are_taken():
    vision, text = pair(300, 250, 32)
    wide = torch.empty(250, 64)
    wide[:, ::2] = text
    result = mir([vision.clone().requires_grad_()], [wide[:, ::2]])
    assert result.value == mir([vision], [text]).value


@pytest.mark.parametrize(
    ("vision", "text", "error", "message"),
    [
        ([], [], ValueError, "vision: expected at least one layer, got an empty list"),
        (
            torch.ones(2, 3, 4),
            [torch.ones(3, 4)],
            TypeError,
            "vision: expected a list with one tensor per decoder layer",
        ),
        (
            [torch.ones(3, 4)] * 2,
            [torch.ones(3, 4)],
            ValueError,
            "vision and text: expected the same number of layers, got 2 and 1",
        ),
        ([torch.randn(9, 4)], [torch.randn(9, 5)], ValueError, "layer 1: vision has d = 4, text has d = 5"),
        ([torch.randn(9, 4)], [torch.randn(1, 4)], ValueError, "layer 1: 1 token of text.*at least 2"),
        ([torch.randn(0, 4)], [torch.randn(9, 4)], ValueError, "layer 1: no token of vision.*at least 2"),
        ([torch.randn(9)], [torch.randn(9)], ValueError, r"layer 1, vision: expected shape \(tokens, d\), got \(9,\)"),
        ([torch.ones(9, 4).long()], [torch.randn(9, 4)], TypeError, "vision, layer 1: expected one of the dtypes"),
        ([torch.randn(9, 4)], [torch.zeros(9, 4)], ValueError, "layer 1: every text token is zero.*Eq. 2"),
        ([[1.0]], [torch.zeros(9, 4)], TypeError, "vision, layer 1: expected a torch.Tensor, got list"),
    ],
)
def test_what_cannot_be_taken_is_named(vision, text, error, message):
    with pytest.raises(error, match=message):
        mir(vision, text)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_token_that_is_not_finite_is_named_with_layer_and_modality(bad):
    vision, text = pair(30, 40, 8)
    broken = text.clone()
    broken[23, 3] = bad
    with pytest.raises(ValueError, match="layer 2: text token 23 is not finite"):
        mir([vision, vision], [text, broken])


@pytest.mark.parametrize(
    ("option", "message"),
    [({"outliers": "iqr"}, "outliers: expected one of"), ({"sqrt_precision": "tf32"}, "sqrt_precision")],
)
def test_options_are_checked(option, message):
    with pytest.raises(ValueError, match=message):
        mir([torch.randn(9, 4)], [torch.randn(9, 4)], **option)
