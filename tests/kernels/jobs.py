"""Every kernel as a job for any device: inputs, the launcher, and the float64 reference."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mir_kernels.ops.moments import packed
from mir_kernels.ops.sqrtm import eager

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STEPS = ((3.2, -2.4, 0.5), (1.875, -1.25, 0.375))


class Job(NamedTuple):
    """make(dtype, rows, d) returns CPU inputs by name, run(inputs) the outputs of a launcher, exact(inputs, found) the
    exact results.

    Masks are named "mask"; rows outside the mask that must not be read are NaN. module: of the launcher.
    """

    name: str
    module: str
    dtypes: tuple[torch.dtype, ...]
    make: Callable[[torch.dtype, int, int], dict[str, Tensor]]
    run: Callable[[dict[str, Tensor]], tuple[Tensor, ...]]
    exact: Callable[[dict[str, Tensor], tuple[Tensor, ...]], tuple[Tensor, ...]]
    factor: float = 2.0  # of the tolerance of `arithmetic`, or of the inputs' dtype if that is None
    arithmetic: torch.dtype | None = None


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def moca_inputs(dtype: torch.dtype, rows: int, d: int) -> dict[str, Tensor]:
    names = ("x", "residual", "grad", "grad_h")
    found = {name: random(rows, d, dtype=dtype, seed=i) for i, name in enumerate(names)}
    vectors = ("scale", "shift", "weight")
    found |= {name: 1 + random(d, dtype=wide(dtype), seed=9 + i) / 4 for i, name in enumerate(vectors)}
    return found | {"mask": torch.arange(rows) % 3 != 1}


def moca_jobs(module: str) -> list[Job]:
    kernels = importlib.import_module(module)

    def forward(t):
        out = torch.empty_like(t["x"])
        kernels.forward(t["x"], t["scale"], t["shift"], t["mask"], out)
        return (out,)

    def forward_exact(t, found):
        x = t["x"].double()
        return (torch.where(t["mask"][:, None], t["scale"].double() * x + t["shift"].double(), x),)

    def backward(t):
        dx = torch.empty_like(t["x"])
        return dx, *kernels.backward(t["grad"], t["x"], t["scale"], t["mask"], dx)

    def backward_exact(t, found):
        x, grad, m = t["x"].double(), t["grad"].double(), t["mask"][:, None]
        inside = torch.where(m, grad, 0.0)
        return torch.where(m, t["scale"].double() * grad, grad), (inside * x).sum(0), inside.sum(0)

    def fused(t):
        out, h = torch.empty_like(t["x"]), torch.empty_like(t["x"])
        rstd = torch.empty(t["x"].shape[0], dtype=wide(t["x"].dtype), device=t["x"].device)
        vectors = (t["scale"], t["shift"], t["mask"], t["weight"])
        kernels.add_rms_forward(t["x"], t["residual"], *vectors, 1e-6, out, h, rstd)
        return out, h, rstd

    def formula(t):
        p = t["x"].double() + t["residual"].double()
        h = torch.where(t["mask"][:, None], t["scale"].double() * p + t["shift"].double(), p)
        rstd = torch.rsqrt(h.square().mean(-1) + 1e-6)
        return h * rstd[:, None] * t["weight"].double(), h, rstd

    def fused_backward(t):
        _, h, rstd = formula(t)
        h, rstd = h.to(t["x"].dtype), rstd.to(wide(t["x"].dtype))
        dx = torch.empty_like(t["x"])
        rows = (t["grad"], t["grad_h"], h, t["x"], t["residual"])
        return dx, *kernels.add_rms_backward(*rows, t["scale"], t["mask"], t["weight"], rstd, dx)

    def fused_backward_exact(t, found):
        names = ("x", "scale", "shift", "weight")
        with torch.enable_grad():
            leaves = t | {n: t[n].double().requires_grad_() for n in names}
            out, h, _ = formula(leaves)
            loss = (out * t["grad"].double()).sum() + (h * t["grad_h"].double()).sum()
            return torch.autograd.grad(loss, [leaves[n] for n in names])

    kind = module.rsplit(".", 1)[-1]
    return [
        Job(f"moca forward, {kind}", module, FLOATS, moca_inputs, forward, forward_exact),
        Job(f"moca backward, {kind}", module, FLOATS, moca_inputs, backward, backward_exact),
        Job(f"add_rms forward, {kind}", module, FLOATS, moca_inputs, fused, lambda t, _: formula(t), 4.0),
        Job(f"add_rms backward, {kind}", module, FLOATS, moca_inputs, fused_backward, fused_backward_exact, 10.0),
    ]


def token_inputs(dtype: torch.dtype, rows: int, d: int) -> dict[str, Tensor]:
    x = random(rows, d, dtype=torch.float64, seed=0)
    x[:, 0] += 64  # a column that is shifted
    mask = torch.arange(rows) % 3 != 1
    return {"x": torch.where(mask[:, None], x, float("nan")).to(dtype), "mask": mask}


def moments_jobs() -> list[Job]:
    from mir_kernels.ops.moments import triton as kernels

    def norms(t):
        return (kernels.token_norms(t["x"]),)

    def second(t):
        x, d = t["x"], t["x"].shape[1]
        zeros = {"dtype": torch.float64, "device": x.device}
        triangle = torch.empty(packed.entries(d), **zeros).zero_()
        vectors, weights = torch.zeros(2, d, **zeros), torch.zeros(2, **zeros)
        kept = torch.where(t["mask"][:, None], x.double(), 0.0)
        centre = kept.sum(0) / t["mask"].sum()
        shift, sums = kernels.accumulate(triangle, x, t["mask"], centre, vectors, weights, "auto")
        return packed.unpack(triangle, d), sums + t["mask"].sum() * shift, shift  # sums alone are only rounding errors

    def second_exact(t, found):
        kept = t["x"].double()[t["mask"]]
        return (kept - found[2]).T @ (kept - found[2]), kept.sum(0), found[2]

    def all_tokens(dtype, rows, d):
        return {"x": random(rows, d, dtype=dtype, seed=0)}

    return [
        Job("token_norms", kernels.__name__, FLOATS, all_tokens, norms,
            lambda t, _: (t["x"].double().norm(dim=1),), 1.0, torch.float32),
        Job("second moment", kernels.__name__, FLOATS[:3], token_inputs, second, second_exact, 10.0, torch.float32),
    ]  # fmt: skip


def root_jobs() -> list[Job]:
    from mir_kernels.ops.sqrtm import triton as kernels
    from mir_kernels.ops.sqrtm import triton_products as products

    def step(t):
        tiles = products.tiles_for(*t["x"].shape[-2:], t["x"].dtype, t["x"].device)
        planes = products.polynomial_step(products.split(t["x"], tiles), STEPS[0], tiles)
        return (products.join(planes, *t["x"].shape[-2:]),)

    def matrices(dtype, rows, d):
        shape = (min(rows, 3), min(d, 300), max(1, min(d, 300) - 2))
        return {"x": eager.normalize(random(*shape, dtype=torch.float64, seed=0), dtype).contiguous()}

    def small(dtype, rows, d):
        return matrices(dtype, rows, min(d, kernels.SMALL))

    def exact(steps):
        def truth(t, found):
            x = t["x"].double()
            for step in steps:
                x = eager.polynomial_step(x, step)
            return (x,)

        return truth

    dtypes = (torch.float32, torch.bfloat16)
    return [
        Job("small polar", kernels.__name__, dtypes, small,
            lambda t: (kernels.small_polar(t["x"], STEPS),), exact(STEPS), 5.0),
        Job("polynomial step", products.__name__, dtypes, matrices, step, exact(STEPS[:1]), 3.0),
    ]  # fmt: skip


def every_job() -> list[Job]:
    from mir_kernels import _native

    native = moca_jobs("mir_kernels.ops.moca.native") if _native.C is not None else []
    return [*moca_jobs("mir_kernels.ops.moca.triton"), *native, *moments_jobs(), *root_jobs()]
