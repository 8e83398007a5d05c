"""Tr((Sv St)^(1/2)) by every recipe in use, error and time side by side; and error against iterations.

    python benchmarks/bench_sqrtm.py                        # time and error at d = 512, 1024 and 2048
    python benchmarks/bench_sqrtm.py --d 64 --batch 512     # many small matrices
    python benchmarks/bench_sqrtm.py --iterations 15        # error against iterations at layer 15 of a real model

For the times, covariances are random rotations of power-law spectra, as hidden states have; the truth is the float64
singular values of the factors they were made from. A rival whose error is beyond the gate is printed without a time.
"""

from __future__ import annotations

import argparse
import csv
import functools
import warnings

import torch
from torch import Tensor

import counts
import harness
from mir_kernels.frechet import trace_sqrt_product, trace_sqrt_report
from mir_kernels.sqrtm import eager, factor

GATE = 1e-2  # relative error of the trace above which a time would mean nothing
SPECTRA = {"i^-1 and i^-1.5": (1.0, 1.5), "i^-2 and i^-2": (2.0, 2.0)}


def covariances(d: int, powers: tuple[float, float], batch: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Two (batch, d, d) float64 covariances and the truth, (batch,)."""
    generator = torch.Generator().manual_seed(d)
    i = torch.arange(1, d + 1, dtype=torch.float64)
    factors = []
    for power in powers:
        q, _ = torch.linalg.qr(torch.randn(batch, d, d, generator=generator, dtype=torch.float64))
        factors.append(q * i ** (-power / 2))
    truth = torch.linalg.svdvals(factors[0].mT @ factors[1]).sum(-1)
    a, b = (c @ c.mT for c in factors)
    return *(((x + x.mT) / 2).to(device) for x in (a, b)), truth


def torch_eigh(a: Tensor, b: Tensor) -> Tensor:
    """sqrt of the eigenvalues of A^(1/2) B A^(1/2), the root by eigenvectors, float64."""
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt()[..., None, :] @ vectors.mT
    return torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum(-1)


def torchmetrics_recipe(a: Tensor, b: Tensor) -> Tensor:
    """torchmetrics' FID: the real part of the square roots of the eigenvalues of AB, a general matrix."""
    return torch.linalg.eigvals(a @ b).sqrt().real.sum(-1)


def scipy_sqrtm(a: Tensor, b: Tensor) -> Tensor:
    """The published accurate mode: scipy.linalg.sqrtm of the float32 product, real part, trace."""
    import scipy.linalg

    product = (a.float() @ b.float()).cpu().numpy()
    roots = [scipy.linalg.sqrtm(p).real.trace() for p in product.reshape(-1, *product.shape[-2:])]
    return torch.tensor(roots, dtype=torch.float64)


def published_fast(a: Tensor, b: Tensor, iterations: int = 10) -> Tensor:
    """The published fast mode: Y <- (Y + Z^-1 AB)/2, Z <- (Z + Y^-1 AB)/2 from Y = AB, Z = I, in float32."""
    product = a.float() @ b.float()
    y, z = product, torch.eye(a.shape[-1], device=a.device).expand_as(product)
    for _ in range(iterations):
        y, z = (y + torch.linalg.solve(z, product)) / 2, (z + torch.linalg.solve(y, product)) / 2
    return y.diagonal(dim1=-2, dim2=-1).sum(-1)


def coupled_newton_schulz(a: Tensor, b: Tensor, iterations: int = 20) -> Tensor:
    """The usual fast recipe: coupled Newton-Schulz on the product, scaled by its Frobenius norm, in float32."""
    product = (a @ b).float()
    scale = torch.linalg.matrix_norm(product)[..., None, None]
    eye = torch.eye(a.shape[-1], device=a.device)
    y, z = product / scale, eye.expand_as(product)
    for _ in range(iterations):
        t = 1.5 * eye - 0.5 * z @ y
        y, z = y @ t, t @ z
    return (y * scale.sqrt()).diagonal(dim1=-2, dim2=-1).sum(-1)


compiled_newton_schulz = torch.compile(coupled_newton_schulz, dynamic=False)


def ours(backend: str, precision: str, bounds: bool = False):
    def call(a: Tensor, b: Tensor) -> Tensor:
        found = trace_sqrt_product(a, b, precision=precision, bounds=bounds, backend=backend)
        return found.value if bounds else found

    return call


def rivals(device: str, d: int) -> dict:
    mine = {
        "ours (linalg)": ours("linalg", "float64"),
        "ours (linalg, with bounds)": ours("linalg", "float64", bounds=True),
    }
    fast = "triton" if device == "cuda" else "eager"
    if device == "cuda" or d <= 512:  # on a CPU LAPACK wins by far
        mine |= {f"ours ({fast}, {precision})": ours(fast, precision) for precision in ("float32", "bfloat16")}
    others = {
        "torch.linalg.eigh twice": torch_eigh,
        "torchmetrics (eigvals of AB)": torchmetrics_recipe,
        "published fast mode (float32)": published_fast,
        "coupled Newton-Schulz, compiled": compiled_newton_schulz,
    }
    if d <= 1024:
        others["scipy.linalg.sqrtm (float32 AB)"] = scipy_sqrtm
    return mine | others


def run(call, a: Tensor, b: Tensor, i: int) -> Tensor:
    return call(a, b)


def time_table(flags: argparse.Namespace) -> None:
    rows = []
    for d in flags.d:
        for name, powers in SPECTRA.items():
            a, b, truth = covariances(d, powers, flags.batch, flags.device)
            entries = []
            for rival, call in rivals(flags.device, d).items():
                try:
                    found = call(a, b).double().cpu()
                    error = ((found - truth) / truth).abs().amax().nan_to_num(float("inf")).item()
                except (RuntimeError, ImportError) as problem:  # no convergence; no scipy; no such solver on the device
                    print(f"{rival}: {type(problem).__name__}: {str(problem).splitlines()[0]}")
                    error = float("inf")
                gate = float("inf") if flags.time_wrong else GATE
                entries.append(harness.Rival(rival, functools.partial(run, call, a, b), error, gate))
            case = f"{flags.batch} x {d}^2, {name}"
            print(case, trace_sqrt_report(a[:1], b[:1], precision="float64").path[0])
            least = counts.trace_sqrt(d).times(flags.batch)
            rows += harness.compare(
                "trace_sqrt_product", case, entries, bytes_moved=least.bytes, flops=least.flops,
                device=flags.device, seconds=flags.seconds, rounds=(3, 50),
            )  # fmt: skip
    harness.print_rows(rows)
    harness.write_csv(rows, flags.out)


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
    n, power = factor.cross_product(x.columns, y.columns, triangular=True), torch.exp2(x.exponent + y.exponent)[0]
    rows = []
    for precision, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
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


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0], "sqrtm")
    parser.add_argument("--d", type=int, nargs="+", default=[512, 1024, 2048], help="sizes of the matrices")
    parser.add_argument("--batch", type=int, default=1, help="matrices in a batch")
    parser.add_argument("--time-wrong", action="store_true", help="time rivals beyond the error gate too")
    parser.add_argument("--iterations", type=int, metavar="LAYER", help="error against iterations instead of time")
    parser.set_defaults(default_out=parser.get_default("out"))
    flags = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_grad_enabled(False)
    time_table(flags) if flags.iterations is None else iteration_table(flags)


if __name__ == "__main__":
    main()
