"""Tr((Sv St)^(1/2)) by every recipe in use, error and time side by side; polar factors; and error against iterations.

    python benchmarks/bench_sqrtm.py                                            # traces at d = 512, 1024 and 2048
    python benchmarks/bench_sqrtm.py --operations polar --d 64 --batch 512      # many small matrices
    python benchmarks/bench_sqrtm.py --device cuda --d 4096 --batch 33          # all layers of a 7B model
    python benchmarks/bench_sqrtm.py --iterations 15      # error against iterations at layer 15 of a real model

For the times, covariances are random rotations of power-law spectra, as hidden states have; the truth is the float64
singular values of the factors they were made from (on CUDA above d = 1024, eigenvalues of A^(1/2) B A^(1/2)). A rival
whose error is beyond its limit is printed without a time; the published fast mode, which is no root at all and wrong
by construction, is timed, for its error stands beside it.
"""

from __future__ import annotations

import argparse
import csv
import functools
import sys
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import counts
import harness
import recipes
from mir_kernels.ops.frechet import trace_sqrt_product, trace_sqrt_report
from mir_kernels.ops.frechet.cross_factor import cross_factor, cross_product
from mir_kernels.ops.frechet.report import TOLERANCE
from mir_kernels.ops.sqrtm import eager, factor
from mir_kernels.ops.sqrtm.launch import polar_iteration

POLAR_LIMITS = {"float16": 3e-2, "float32": 1e-3}  # relative error of a polar factor iterated in this precision
GATE = 1e-2  # relative error of the trace above which a rival's time would mean nothing
DISTINCT = 1 << 23  # elements of different matrices made on a GPU; a larger batch repeats them
SPECTRA = {"i^-1 and i^-1.5": (1.0, 1.5), "i^-2 and i^-2": (2.0, 2.0)}


def covariances(d: int, powers: tuple[float, float], batch: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Two (batch, d, d) float64 covariances and the truth, (batch,)."""
    made_on = "cuda" if device == "cuda" and d > 1024 else "cpu"
    distinct = min(batch, max(1, DISTINCT // d**2)) if made_on == "cuda" else batch
    generator = torch.Generator(made_on).manual_seed(d)
    i = torch.arange(1, d + 1, dtype=torch.float64, device=made_on)
    factors = []
    for power in powers:
        normal = torch.randn(distinct, d, d, generator=generator, dtype=torch.float64, device=made_on)
        factors.append(torch.linalg.qr(normal).Q * i ** (-power / 2))
    a, b = (((x + x.mT) / 2).to(device) for x in (c @ c.mT for c in factors))
    if made_on == "cuda":  # a GPU takes minutes for singular values of this size
        truth = recipes.eigh_trace(a, b).cpu()
    else:
        truth = torch.linalg.svdvals(factors[0].mT @ factors[1]).sum(-1)
    repeats = -(-batch // distinct)
    return *(x.repeat(repeats, 1, 1)[:batch] for x in (a, b)), truth.repeat(repeats)[:batch]


compiled_newton_schulz = harness.compiled(recipes.coupled_newton_schulz_trace, dynamic=False)


def ours(backend: str, precision: str, bounds: bool = False):
    def call(a: Tensor, b: Tensor) -> Tensor:
        found = trace_sqrt_product(a, b, precision=precision, bounds=bounds, backend=backend)
        return found.value if bounds else found

    return call


def unproved(a: Tensor, b: Tensor) -> Tensor:
    """<U, N> with U iterated in 16 bits from the float64 factors, as it comes: nothing says how far off it is."""
    values = []
    for one, other in zip(a, b, strict=True):  # a batch of 33 at once would hold 13 GB beside its inputs
        pair = cross_factor(one[None], other[None], 1e-6)
        u = polar_iteration(pair.n, "float16", "triton" if a.is_cuda else "eager")
        values.append(pair.trace((u * pair.n).sum((-2, -1))))
    return torch.cat(values)


def trace_rivals(a: Tensor, b: Tensor, truth: Tensor) -> list[harness.Rival]:
    """What is timed at this size on this device, ours first."""
    device, d = a.device.type, a.shape[-1]
    calls = {}  # and the largest error that is timed
    if device == "cpu" or d <= 1024:  # a GPU finds singular values slowly
        calls["ours (linalg)"] = ours("linalg", "float64"), TOLERANCE["float64"]
        calls["ours (linalg, with bounds)"] = ours("linalg", "float64", bounds=True), TOLERANCE["float64"]
    fast = "triton" if device == "cuda" else "eager"
    if device == "cuda" or d <= 512:  # on a CPU LAPACK wins by far
        for precision in ("float32", "bfloat16"):
            calls[f"ours ({fast}, {precision})"] = ours(fast, precision), TOLERANCE[precision]
        calls["ours (16 bits, without proof)"] = unproved, GATE
    calls |= {
        "torch.linalg.eigh twice": (recipes.eigh_trace, GATE),
        "torchmetrics (eigvals of AB)": (recipes.torchmetrics_trace, GATE),
        "published fast mode (float32)": (recipes.published_fast_trace, None),
    }
    if device == "cuda" or d <= 1024:  # on a CPU 60 products take longer than all others together
        calls["coupled Newton-Schulz, compiled"] = compiled_newton_schulz, GATE
    if d <= 1024:
        calls["scipy.linalg.sqrtm (float32 AB)"] = recipes.published_accurate_trace, GATE
    return [
        harness.Rival(name, lambda i, c=call: c(a, b), lambda c=call: worst(c(a, b), truth), limit)
        for name, (call, limit) in calls.items()
    ]


def worst(found: Tensor, truth: Tensor) -> float:
    """The largest relative error in a batch of traces."""
    return ((found.double().cpu() - truth) / truth).abs().amax().nan_to_num(float("inf")).item()


def trace_rows(flags: argparse.Namespace, d: int) -> Iterator[list[dict]]:
    for name in flags.spectra:
        a, b, truth = covariances(d, SPECTRA[name], flags.batch, flags.device)
        case = f"{flags.batch} x {d}^2, {name}"
        if flags.device == "cpu":
            print(case, trace_sqrt_report(a[:1], b[:1], precision="float64").path[0])
        least = counts.trace_sqrt(d).times(flags.batch)
        work = {"float64_flops" if flags.device == "cpu" else "flops": least.flops}
        entries = harness.without(trace_rivals(a, b, truth), flags.skip)
        yield harness.compare(
            "trace_sqrt_product", case, entries, bytes_moved=least.bytes, **work,
            device=flags.device, seconds=flags.seconds, rounds=(5 if d < 2048 else 3, 50),
        )  # fmt: skip


def polar_case(d: int, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """float32 matrices (batch, d, d), and the polar factors of the first four of them in float64."""
    m = torch.randn(batch, d, d, generator=torch.Generator(device).manual_seed(d), device=device)
    return m, eager.polar(m[:4].double(), "float64")


def polar_rival(name: str, call: Callable[[], Tensor], exact: Tensor, precision: str) -> harness.Rival:
    return harness.Rival(name, lambda i: call(), lambda: distance(call()[:4].double(), exact), POLAR_LIMITS[precision])


def polar_rows(flags: argparse.Namespace, d: int) -> Iterator[list[dict]]:
    """The same schedule of steps by our kernels, by cuBLAS or BLAS, and by torch.compile over it."""
    m, exact = polar_case(d, flags.batch, flags.device)
    compiled = harness.compiled(eager.polar, dynamic=False)
    backend = "triton" if flags.device == "cuda" else "eager"
    for precision in POLAR_LIMITS:
        calls = {
            f"ours ({backend})": functools.partial(polar_iteration, m, precision, backend),
            "the same steps in torch": functools.partial(eager.polar, m, precision),
            "the same steps, torch.compile": functools.partial(compiled, m, precision),
        }
        entries = harness.without(
            [polar_rival(name, call, exact, precision) for name, call in calls.items()], flags.skip
        )
        least = counts.polar_step(d).times(flags.batch * len(eager.steps_for(precision)))
        yield harness.compare(
            "polar", f"{flags.batch} x {d}^2, {precision}", entries, bytes_moved=8 * m.numel(), flops=least.flops,
            device=flags.device, seconds=flags.seconds, rounds=(5, 100),
        )  # fmt: skip


def distance(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


def time_table(flags: argparse.Namespace) -> int:
    rows: list[dict] = []
    for operation in flags.operations:
        for d in flags.d:
            for case in {"trace": trace_rows, "polar": polar_rows}[operation](flags, d):
                rows += case
                harness.write_csv(rows, flags.out)  # what is known so far, should time run out
    harness.print_rows(rows)
    return harness.exit_code(rows)


def iteration_table(flags: argparse.Namespace) -> None:
    """Error of the trace after k iterations: coupled on the product against the polar factor of N."""
    from layer_covariances import layer_covariances

    rows = []
    for case, pair in layer_covariances(flags.iterations).items():
        rows += iteration_rows(case, *(covariance[None] for covariance in pair))
    target = harness.DATA / "sqrtm_iterations.csv" if flags.out == flags.default_out else flags.out
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for r in rows:
        if r["iterations"] in (5, 10, 15, 20, 30):
            print(f"{r['case']}  {r['method']:<24}{r['precision']:<10}{r['iterations']:>3}  {r['error']}")


def iteration_rows(case: str, a: Tensor, b: Tensor) -> list[dict]:
    """One row a method, precision and number of iterations, for covariances (1, d, d)."""
    truth = trace_sqrt_product(a, b, precision="float64")[0]
    x, y = factor.factor(a), factor.factor(b)
    n, power = cross_product(x.columns, y.columns, triangular=True), torch.exp2(x.exponent + y.exponent)[0]
    rows = []
    for precision in ("bfloat16", "float16", "float32"):
        dtype = eager.DTYPES[precision]
        for k, value in enumerate(coupled_values(a @ b, dtype, 30), start=1):
            rows.append(row(case, "coupled Newton-Schulz", precision, k, value, truth))
        for k in range(1, 31):
            # As many steps as are left are what the schedule would be for the interval they can cover.
            lower = next(
                low for e in range(1, 13) if len(eager.steps_for(precision, None, low := 10.0**-e)) >= k or e == 12
            )
            u = eager.polar(n, precision, iterations=k, lower=lower).double()
            rows.append(row(case, "polar factor", precision, k, (u * n).sum() * power, truth))
    return rows


def coupled_values(product: Tensor, dtype: torch.dtype, iterations: int):
    """Tr(Y) after each textbook coupled step with nothing to hold it, in `dtype` with float32 sums."""
    scale = torch.linalg.matrix_norm(product)[..., None, None]
    eye = torch.eye(product.shape[-1], dtype=dtype)
    y, z = (product / scale).to(dtype), eye.expand_as(product)
    for _ in range(iterations):
        t = (1.5 * eye.float() - 0.5 * eager.product(z, y).float()).to(dtype)
        y, z = eager.product(y, t), eager.product(t, z)
        yield (y.double() * scale.sqrt()).diagonal(dim1=-2, dim2=-1).sum()


def row(case: str, method: str, precision: str, k: int, value: Tensor, truth: Tensor) -> dict:
    error = ((value - truth) / truth).abs().nan_to_num(float("inf")).item()
    return {"case": case, "method": method, "precision": precision, "iterations": k, "error": f"{error:.6g}"}


def main() -> int:
    parser = harness.arguments(__doc__.splitlines()[0], "sqrtm")
    parser.add_argument("--d", type=int, nargs="+", default=[512, 1024, 2048], help="sizes of the matrices")
    parser.add_argument("--batch", type=int, default=1, help="matrices in a batch")
    parser.add_argument("--operations", nargs="+", default=["trace"], choices=("trace", "polar"), help="what is timed")
    parser.add_argument("--spectra", nargs="+", default=list(SPECTRA), choices=SPECTRA, help="of the two covariances")
    parser.add_argument("--iterations", type=int, metavar="LAYER", help="error against iterations instead of time")
    parser.set_defaults(default_out=parser.get_default("out"))
    flags = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_grad_enabled(False)
    if flags.iterations is not None:
        iteration_table(flags)
        return 0
    return time_table(flags)


if __name__ == "__main__":
    sys.exit(main())
