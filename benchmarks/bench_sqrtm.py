"""Benchmark Tr((Sv St)^(1/2)) by all common methods (error and time), polar factors, and error against iterations.

    python benchmarks/bench_sqrtm.py                                            # traces from d = 64 to 4096 on a CPU
    python benchmarks/bench_sqrtm.py --operations polar --d 64 --batch 512      # many small matrices
    python benchmarks/bench_sqrtm.py --device cuda --d 4096 --batch 33          # all layers of a 7B model
    python benchmarks/bench_sqrtm.py --iterations 15      # error against iterations at layer 15 of a real model

Timed covariances are random rotations of power-law spectra, like those of hidden states. The reference is the float64
singular values of the factors they were made from (on CUDA above d = 1024, eigenvalues of A^(1/2) B A^(1/2)). A rival
whose error exceeds its limit is printed without a time. The published fast mode, which is not a root and wrong by
construction, is timed anyway, and its error is shown. On a CPU, LAPACK's three calls for the trace run in a separate
process (lapack_root.py); one `eigvalsh` of A is a yardstick, not a rival, and has no error. Slow rivals are skipped
where they take minutes.
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
import lapack_root
import recipes
from mir_kernels.ops.frechet import trace_sqrt_product, trace_sqrt_report
from mir_kernels.ops.frechet.cross_factor import cross_factor, cross_product
from mir_kernels.ops.frechet.report import TOLERANCE
from mir_kernels.ops.sqrtm import eager, factor
from mir_kernels.ops.sqrtm.launch import polar_iteration

POLAR_LIMITS = {"float16": 3e-2, "float32": 1e-3}  # relative error of a polar factor iterated in this precision
GATE = 1e-2  # relative error of the trace above which a rival's time would be meaningless
DISTINCT = 1 << 23  # elements of distinct matrices generated on a GPU; a larger batch repeats them
SPECTRA = {"i^-1 and i^-1.5": (1.0, 1.5), "i^-2 and i^-2": (2.0, 2.0)}
# {size: batches} that are timed by default.
SHAPES = {512: (1,), 1024: (1,), 2048: (1,)}
CPU_TRACES = {64: (1, 64), 128: (1, 64), 256: (1,), 1024: (1,), 2048: (1,), 4096: (1,)}
MIDDLE = range(256, 2048)  # sizes for which a CPU also runs the second default spectrum and the tighter bounds
YARDSTICK = "one eigvalsh (torch)"
OURS, PROVED, CLOSER = "ours (linalg)", "ours (linalg, bounds to 1e-6)", "ours (linalg, bounds to 1e-8)"
TORCHMETRICS = "torchmetrics (eigvals of AB)"
# {name: (rival, rival)}: ratios of medians of one case.
RATIOS = {
    "ours / LAPACK": (OURS, lapack_root.NAME),
    "with bounds / ours": (PROVED, OURS),
    "ours / one eigvalsh": (OURS, YARDSTICK),
    "torchmetrics / ours": (TORCHMETRICS, OURS),
}


def covariances(d: int, powers: tuple[float, float], batch: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Two (batch, d, d) float64 covariances and the exact traces, (batch,)."""
    made_on = "cuda" if device == "cuda" and d > 1024 else "cpu"
    distinct = min(batch, max(1, DISTINCT // d**2)) if made_on == "cuda" else batch
    generator = torch.Generator(made_on).manual_seed(d)
    i = torch.arange(1, d + 1, dtype=torch.float64, device=made_on)
    factors = []
    for power in powers:
        normal = torch.randn(distinct, d, d, generator=generator, dtype=torch.float64, device=made_on)
        factors.append(torch.linalg.qr(normal).Q * i ** (-power / 2))
    a, b = (((x + x.mT) / 2).to(device) for x in (c @ c.mT for c in factors))
    if made_on == "cuda":  # singular values of this size take minutes on a GPU
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
    """<U, N> with U iterated in 16 bits from the float64 factors, without any bound of its error."""
    values = []
    for one, other in zip(a, b, strict=True):  # a batch of 33 at once would need 13 GB besides its inputs
        pair = cross_factor(one[None], other[None], 1e-6)
        u = polar_iteration(pair.n, "float16", "triton" if a.is_cuda else "eager")
        values.append(pair.trace((u * pair.n).sum((-2, -1))))
    return torch.cat(values)


def trace_rivals(a: Tensor, b: Tensor, truth: Tensor) -> list[harness.Rival]:
    """The rivals to time at this size on this device, ours first."""
    device, d = a.device.type, a.shape[-1]
    calls = {}  # {name: (call, largest error that is timed)}
    if device == "cpu" or d <= 1024:  # singular values are slow on a GPU
        calls[OURS] = ours("linalg", "float64"), TOLERANCE["float64"]
        if device == "cpu":
            calls[PROVED] = ours("linalg", "float32", bounds=True), TOLERANCE["float32"]
        if device == "cuda" or d in MIDDLE:
            calls[CLOSER] = ours("linalg", "float64", bounds=True), TOLERANCE["float64"]
    fast = "triton" if device == "cuda" else "eager"
    if device == "cuda" or d <= 512:  # on a CPU LAPACK is much faster
        for precision in ("float32", "bfloat16"):
            calls[f"ours ({fast}, {precision})"] = ours(fast, precision), TOLERANCE[precision]
        calls["ours (16 bits, without proof)"] = unproved, GATE
    if device == "cuda" or d <= 2048:  # on a CPU these take half a minute per call
        calls["torch.linalg.eigh twice"] = recipes.eigh_trace, GATE
        calls[TORCHMETRICS] = recipes.torchmetrics_trace, GATE
    if device == "cuda" or d <= 1024:
        calls["published fast mode (float32)"] = recipes.published_fast_trace, None
    if device == "cuda" or 128 < d <= 1024:  # on a CPU either the compiler or the 60 products take long
        calls["coupled Newton-Schulz, compiled"] = compiled_newton_schulz, GATE
    if d <= 1024:
        calls["scipy.linalg.sqrtm (float32 AB)"] = recipes.published_accurate_trace, GATE
    rivals = [
        harness.Rival(name, lambda i, c=call: c(a, b), lambda c=call: worst(c(a, b), truth), limit)
        for name, (call, limit) in calls.items()
    ]
    if device == "cuda":
        return rivals
    rivals = [lapack_root.rested(rival) if rival.name.startswith("scipy") else rival for rival in rivals]
    return [*rivals[:2], harness.Rival(YARDSTICK, lambda i: torch.linalg.eigvalsh(a)), *rivals[2:]]


def worst(found: Tensor, truth: Tensor) -> float:
    """The largest relative error in a batch of traces."""
    return ((found.double().cpu() - truth) / truth).abs().amax().nan_to_num(float("inf")).item()


def trace_rows(flags: argparse.Namespace, d: int, batch: int, lapack: lapack_root.LapackRoot) -> Iterator[list[dict]]:
    cpu, rounds = flags.device == "cpu", (5 if d < 2048 else 3, 50)
    one_spectrum = cpu and flags.d is None and d not in MIDDLE
    for name in flags.spectra or [*SPECTRA][: 1 if one_spectrum else None]:
        a, b, truth = covariances(d, SPECTRA[name], batch, flags.device)
        case = f"{batch} x {d}^2, {name}"
        rivals = trace_rivals(a, b, truth)
        if cpu:
            rivals.insert(2, lapack.rival(a, b, functools.partial(worst, truth=truth), GATE))
        least = counts.trace_sqrt_on(flags.device, d).times(batch)
        work = {"float64_flops" if cpu else "flops": least.flops}
        rows = harness.compare(
            "trace_sqrt_product", case, harness.without(rivals, flags.skip), bytes_moved=least.bytes, **work,
            device=flags.device, seconds=flags.seconds, rounds=rounds,
        )  # fmt: skip
        if cpu:
            path = trace_sqrt_report(a[:1], b[:1], precision="float64").path[0]
            print(f"{case}: ours by {path}{lapack.solver and f', eigenvalues of LAPACK by {lapack.solver}'}")
        own = {rival.name: rival for rival in rivals if isinstance(rival, lapack_root.SelfTimed)}
        yield [own[row["rival"]].retimed(row, rounds[0]) if row["rival"] in own else row for row in rows]


def ratio_lines(rows: list[dict]) -> list[str]:
    """RATIOS of the cases that have the rows, one line per case."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        ms = {row["rival"]: row["p50_ms"] for row in rows if row["case"] == case and row["p50_ms"]}
        found = [f"{name} {ms[x] / ms[y]:.2f}" for name, (x, y) in RATIOS.items() if x in ms and y in ms]
        if found:
            lines.append(f"{case}: {', '.join(found)}")
    return lines


def polar_case(d: int, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """float32 matrices (batch, d, d), and float64 polar factors of the first four."""
    m = torch.randn(batch, d, d, generator=torch.Generator(device).manual_seed(d), device=device)
    return m, eager.polar(m[:4].double(), "float64")


def polar_rival(name: str, call: Callable[[], Tensor], exact: Tensor, precision: str) -> harness.Rival:
    return harness.Rival(name, lambda i: call(), lambda: distance(call()[:4].double(), exact), POLAR_LIMITS[precision])


def polar_rows(flags: argparse.Namespace, d: int, batch: int) -> Iterator[list[dict]]:
    """The same schedule of steps by our kernels, by cuBLAS or BLAS, and under torch.compile."""
    m, exact = polar_case(d, batch, flags.device)
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
        least = counts.polar_step(d).times(batch * len(eager.steps_for(precision)))
        yield harness.compare(
            "polar", f"{batch} x {d}^2, {precision}", entries, bytes_moved=8 * m.numel(), flops=least.flops,
            device=flags.device, seconds=flags.seconds, rounds=(5, 100),
        )  # fmt: skip


def distance(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


def shapes(flags: argparse.Namespace, operation: str) -> list[tuple[int, int]]:
    """(d, batch) of every case: `--d` and `--batch`, or the defaults if one is not given."""
    default = CPU_TRACES if (operation, flags.device) == ("trace", "cpu") else SHAPES
    batches = {d: default.get(d, (1,)) if flags.batch is None else (flags.batch,) for d in flags.d or default}
    return [(d, batch) for d, several in batches.items() for batch in several]


def time_table(flags: argparse.Namespace) -> int:
    rows: list[dict] = []
    with lapack_root.LapackRoot(torch.get_num_threads()) as lapack:
        of = {"trace": functools.partial(trace_rows, lapack=lapack), "polar": polar_rows}
        for operation in flags.operations:
            for d, batch in shapes(flags, operation):
                for case in of[operation](flags, d, batch):
                    rows += case
                    harness.write_csv(rows, flags.out)  # after every case, in case time runs out
    harness.print_rows(rows)
    print("", *ratio_lines(rows), sep="\n")
    return harness.exit_code(rows)


def iteration_table(flags: argparse.Namespace) -> None:
    """Error of the trace after k iterations: the coupled iteration on the product against the polar factor of N."""
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
    """One row per method, precision and number of iterations, for covariances (1, d, d)."""
    truth = trace_sqrt_product(a, b, precision="float64")[0]
    x, y = factor.factor(a), factor.factor(b)
    n, power = cross_product(x.columns, y.columns, triangular=True), torch.exp2(x.exponent + y.exponent)[0]
    rows = []
    for precision in ("bfloat16", "float16", "float32"):
        dtype = eager.DTYPES[precision]
        for k, value in enumerate(coupled_values(a @ b, dtype, 30), start=1):
            rows.append(row(case, "coupled Newton-Schulz", precision, k, value, truth))
        for k in range(1, 31):
            # The schedule for the widest interval that k steps can cover.
            lower = next(
                low for e in range(1, 13) if len(eager.steps_for(precision, None, low := 10.0**-e)) >= k or e == 12
            )
            u = eager.polar(n, precision, iterations=k, lower=lower).double()
            rows.append(row(case, "polar factor", precision, k, (u * n).sum() * power, truth))
    return rows


def coupled_values(product: Tensor, dtype: torch.dtype, iterations: int):
    """Tr(Y) after each textbook coupled step without safeguards, in `dtype` with float32 sums."""
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
    parser.add_argument("--d", type=int, nargs="+", help="sizes of the matrices")
    parser.add_argument("--batch", type=int, help="matrices in a batch")
    parser.add_argument("--operations", nargs="+", default=["trace"], choices=("trace", "polar"), help="what to time")
    parser.add_argument("--spectra", nargs="+", choices=SPECTRA, help="spectra of the two covariances")
    parser.add_argument(
        "--iterations", type=int, metavar="LAYER", help="measure error against iterations at this layer, not time"
    )
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
