"""Benchmark streaming mean and covariance, and token norms, against common implementations. `--help` lists the sizes.

Every rival computes sums or moments of (n, d) bfloat16 tokens; one column has a mean of 150 standard deviations. The
error shown is the largest error of a covariance entry relative to sigma_i sigma_j. Ours is timed only if it keeps its
promise (1e-5, for "exact" 1e-10); a rival only has to return a covariance (1e-1).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import counts
import harness
from mir_kernels import StreamingMoments, token_norms
from mir_kernels.ops.moments import reference
from mir_kernels.ops.moments.launch import STREAMING_MOMENTS, TOKEN_NORMS

PROMISE = {"auto": 1e-5, "exact": 1e-10, "fast": 1e-1}


def tokens(n: int, d: int, device: str) -> Tensor:
    """(n, d) bfloat16: one column with mean / standard deviation 150, forty up to 10, the others around zero."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 2 * x[:, 0] + 300
    x[:, 1:41] += torch.linspace(0, 10, 40)[: max(0, min(40, d - 1))]
    return x.bfloat16().to(device)


def covariance_error(covariance: Tensor, true: Tensor) -> float:
    sigma = true.diagonal().sqrt()
    return ((covariance.double() - true).abs() / (sigma[:, None] * sigma)).max().item()


def from_sums(total: Tensor, products: Tensor, n: int) -> Tensor:
    """The covariance from sum x and sum x x^T, in float64."""
    mean = total.double() / n
    return (products.double() - n * mean[:, None] * mean) / (n - 1)


def ours(x: Tensor, precision: str, backend: str) -> StreamingMoments:
    moments = StreamingMoments(x.shape[1], device=x.device, precision=precision, backend=backend)
    moments.update(x)
    moments.mean  # noqa: B018  # folds in the gathered rows
    return moments


def float64_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """The update of torchmetrics' FrechetInceptionDistance for each batch."""
    features = x.double()
    return features.sum(0), features.t().mm(features)


def rival(name: str, run: Callable, xs: list[Tensor], error: Callable, limit: float) -> harness.Rival:
    """`run` on each set of tokens in turn; error: of its result for the first set."""
    return harness.Rival(name, lambda i: run(xs[i % len(xs)]), lambda: error(run(xs[0])), limit)


def covariance_rivals(xs: list[Tensor]) -> list[harness.Rival]:
    n = xs[0].shape[0]
    device = xs[0].device.type
    true = reference.covariance(xs[0])
    rivals = []

    def add(name: str, run: Callable, covariance: Callable, limit: float) -> None:  # covariance: of what run returned
        rivals.append(rival(name, run, xs, lambda out: covariance_error(covariance(out).to(true.device), true), limit))

    add("torchmetrics recipe (float64)", float64_sums, lambda out: from_sums(*out, n), 1e-1)
    for backend in harness.backends(STREAMING_MOMENTS, device):
        for precision, limit in PROMISE.items():
            if precision == "fast" and backend != "triton":
                continue
            run = functools.partial(ours, precision=precision, backend=backend)
            add(f"ours, {precision}, {backend}", run, StreamingMoments.covariance, limit)
    gram = harness.compiled(lambda x: (x.float().sum(0), x.float().t() @ x.float()), dynamic=False)
    add("torch.compile, float32 sums", gram, lambda out: from_sums(*out, n), 1e-1)
    if device == "cuda":
        # Only the product is timed, without the sums and allocations that a covariance also needs. Its float32 sums may
        # lose a large mean; the error is shown next to the time, as for every rival.
        total, unread = xs[0].double().sum(0), torch.empty(true.shape, device=device)
        product = functools.partial(gram_addmm, unread)
        add("torch.addmm, bf16 to float32", product, lambda out: from_sums(total, out, n), float("inf"))
    add("torch.cov, float32", lambda x: torch.cov(x.float().T), lambda c: c, 1e-1)
    if device == "cpu":
        add("numpy.cov, float64", numpy_cov, torch.from_numpy, 1e-1)
        add("scipy ssyrk, float32 sums", ssyrk, lambda out: from_sums(*out, n), 1e-1)
    return rivals


def gram_addmm(unread: Tensor, x: Tensor) -> Tensor:
    """x^T x in float32 from bfloat16; `unread` (d, d) gives addmm its shape."""
    return torch.addmm(unread, x.T, x, beta=0, out_dtype=torch.float32)


def numpy_cov(x: Tensor):
    import numpy

    return numpy.cov(x.double().numpy(), rowvar=False)


def ssyrk(x: Tensor) -> tuple[Tensor, Tensor]:
    from scipy.linalg import blas

    features = x.float()
    upper = torch.from_numpy(blas.ssyrk(1.0, features.numpy().T))
    return features.sum(0), upper.triu() + upper.triu(1).T


def norm_rivals(xs: list[Tensor]) -> list[harness.Rival]:
    true = reference.token_norms(xs[0]).double()
    rivals = []

    def add(name: str, run: Callable, limit: float) -> None:
        rivals.append(rival(name, run, xs, lambda out: ((out.double() - true).norm() / true.norm()).item(), limit))

    add("torch.linalg.vector_norm, bf16", lambda x: torch.linalg.vector_norm(x, dim=-1), 1e-1)
    add("x.float().norm", lambda x: x.float().norm(dim=-1), 1e-1)
    for backend in harness.backends(TOKEN_NORMS, xs[0].device.type):
        add(f"ours, {backend}", functools.partial(token_norms, backend=backend), 1e-6)
    return rivals


def floor(count: counts.Count) -> dict[str, int]:
    return {"bytes_moved": count.bytes, "flops": count.flops}


def main() -> int:
    parser = harness.arguments(__doc__.splitlines()[0], "moments")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 576], help="n of each case")
    parser.add_argument("--d", type=int, nargs="+", default=None, help="d of each case (2048 on a CPU, 4096 on CUDA)")
    args = parser.parse_args()
    rows = []
    for d in args.d or [4096 if args.device == "cuda" else 2048]:
        for n in args.tokens:
            xs = [tokens(n, d, args.device) for _ in range(4 if args.device == "cuda" else 1)]
            case = f"bfloat16 ({n}, {d})"
            rows += harness.compare(
                "covariance",
                case,
                harness.without(covariance_rivals(xs), args.skip),
                **floor(counts.covariance(n, d)),
                seconds=args.seconds,
                device=args.device,
            )
            rows += harness.compare(
                "token_norms",
                case,
                harness.without(norm_rivals(xs), args.skip),
                **floor(counts.token_norms(n, d)),
                seconds=args.seconds / 4,
                device=args.device,
            )
            harness.write_csv(rows, args.out)  # after every case, in case the next one crashes
    harness.print_rows(rows)
    return harness.exit_code(rows)


if __name__ == "__main__":
    sys.exit(main())
