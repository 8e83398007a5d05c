"""Compiled and traced code rejects the same values as eager code with the same messages, and returns no result."""

import warnings

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from kernels.edge_calls import CALLS, D, covariances
from mir_kernels import frechet_distance, sqrtm, trace_sqrt_product

GOOD, OTHER = covariances(4), covariances(4)
MEANS = (GOOD[:, 0].clone(), GOOD[:, 1].clone())


def spoiled(kind):
    bad = GOOD.clone()
    if kind == "asymmetric":
        bad[1, 0, 3] += 0.5
    elif kind == "indefinite":
        bad[2] -= 2 * torch.eye(D)
    elif kind == "negative variance":
        bad[0, 2, 2] = -1.0
    elif kind == "infinite":
        bad[3, 0, 0] = torch.inf
    else:
        bad[0, 0, 2] = torch.nan
    return bad


KINDS = ("asymmetric", "indefinite", "negative variance", "infinite", "NaN")
MATRICES = {
    **{name: (CALLS[name].function, CALLS[name].argument) for name in
       ("sqrtm", "inverse_sqrtm", "polar", "newton_schulz", "trace_sqrt_product", "frechet_distance")},
    "sqrtm by eigenvectors": (lambda a: sqrtm(a, method="eigh"), "a"),
    "second of a trace": (lambda b: trace_sqrt_product(OTHER, b), "b"),
    "cov_y of a distance": (lambda b: frechet_distance(MEANS[0], OTHER, MEANS[1], b, bounds=True), "cov_y"),
    "mean_x of a distance": (lambda a: frechet_distance(a[:, 0], OTHER, MEANS[1], OTHER), "mean_x"),
}  # fmt: skip
ACCEPTED = {  # accepted, because the operation does not require it of its argument
    "polar": ("asymmetric", "indefinite", "negative variance"),
    "mean_x of a distance": ("asymmetric", "indefinite", "negative variance"),
}
COMPILERS = {
    "compiled": lambda f: torch.compile(f, backend="aot_eager", fullgraph=True),
    "traced": lambda f: make_fx(f)(GOOD),
}


@pytest.mark.parametrize("how", COMPILERS)
@pytest.mark.parametrize("name", MATRICES)
def test_the_same_values_are_refused(name, how):
    function, argument = MATRICES[name]
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # newton_schulz does not converge
        made = COMPILERS[how](lambda x: function(x))
        made(GOOD)
        for kind in KINDS:
            bad = spoiled(kind)
            if kind in ACCEPTED.get(name, ()):
                made(bad)
                continue
            with pytest.raises(ValueError, match=f"^{argument}: expected") as eager:
                function(bad)
            with pytest.raises(ValueError, match=f"^{argument}: expected") as found:
                made(bad)
            assert str(found.value) == str(eager.value)


@pytest.mark.parametrize("how", COMPILERS)
def test_a_missed_tolerance_is_told(how):
    torch.compiler.reset()
    made = COMPILERS[how](lambda a: sqrtm(a, method="polar", precision="bfloat16", tol=1e-12))
    with pytest.warns(RuntimeWarning, match=r"sqrtm: reached a relative residual of .*, above tol=1e-12"):
        made(GOOD)


def test_a_warning_points_at_whoever_called():
    for call in (
        lambda: sqrtm(GOOD, method="polar", precision="bfloat16", tol=1e-12),
        lambda: CALLS["newton_schulz"].function(GOOD * 0 + torch.eye(D) * torch.logspace(0, -12, D)),
    ):
        with pytest.warns(RuntimeWarning) as told:
            call()
        assert told[0].filename.startswith(str(__file__).rpartition("/")[0])
