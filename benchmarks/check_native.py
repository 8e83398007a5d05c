"""Check every native MoCa kernel in every dtype against float64: odd sizes, strided rows, odd addresses, in place.

compute-sanitizer --tool memcheck python benchmarks/check_native.py --device cuda

--module FOLDER: use the compiled module in that folder instead of the installed one.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

NAME = "mir_kernels._C"

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-13}


class Case(NamedTuple):
    """A matrix with `offset` elements before it and `gap` after each row; results are in place or elsewhere."""

    rows: int
    d: int
    offset: int = 0
    gap: int = 0
    in_place: bool = False

    def placed(self, values: Tensor, device: str) -> Tensor:
        """The values at this case's offset and row distance, in a buffer that ends with their last element."""
        stride = self.d + self.gap
        size = self.offset + (self.rows - 1) * stride + self.d
        buffer = torch.full((size,), float("nan"), dtype=values.dtype, device=device)
        return buffer.as_strided(values.shape, (stride, 1), self.offset).copy_(values)


CASES = [
    *(Case(1, 1), Case(37, 7), Case(129, 576), Case(65, 1032)),
    *(Case(37, 7, in_place=True), Case(129, 576, in_place=True)),
    *(Case(33, 576, offset=16, gap=32), Case(33, 576, offset=1, gap=3), Case(33, 577, gap=5)),
    *(Case(33, 576, offset=16, gap=32, in_place=True), Case(33, 577, offset=1, gap=3, in_place=True)),
]


def kernels(folder: Path | None) -> tuple[ModuleType, ModuleType]:
    """mir_kernels._native and its MoCa launchers, with the compiled module from anywhere below `folder` if given.

    Raises FileNotFoundError if there is none for this interpreter.
    """
    if folder is not None:
        ends = importlib.machinery.EXTENSION_SUFFIXES
        files = [path for path in sorted(folder.rglob("_C.*")) if path.name.removeprefix("_C") in ends]
        if not files:
            raise FileNotFoundError(f"--module: expected a folder with _C{ends[0]}, got {folder}")
        spec = importlib.util.spec_from_file_location(NAME, files[0])
        sys.modules[NAME] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    from mir_kernels import _native
    from mir_kernels.ops.moca import native

    return _native, native


def results(
    native: ModuleType, case: Case, dtype: torch.dtype, device: str, seed: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """{name: (result, float64 reference)}."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, grad = (torch.randn(case.rows, case.d, generator=generator).to(dtype) for _ in range(2))
    scale, shift = (torch.randn(case.d, generator=generator).to(wide) for _ in range(2))
    mask = torch.arange(case.rows) % 2 == 0
    a, g, nothing = (case.placed(t, device) for t in (x, grad, torch.full_like(x, float("nan"))))
    u, v, m = (t.to(device) for t in (scale, shift, mask))
    dx = g if case.in_place else nothing.clone()
    sums = native.backward(g, a, u, m, dx)
    out = a if case.in_place else nothing
    native.forward(a, u, v, m, out)
    m = mask[:, None]
    return {
        "out": (out, torch.where(m, x.double() * scale.double() + shift.double(), x.double())),
        "dx": (dx, torch.where(m, grad.double() * scale.double(), grad.double())),
        "dscale": (sums[0], (grad.double() * x.double() * m).sum(0)),
        "dshift": (sums[1], (grad.double() * m).sum(0)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument(
        "--can-run", action="store_true", help="only check whether the compiled kernels are available: exit code 0 or 1"
    )
    parser.add_argument("--module", type=Path, help="folder with another compiled module")
    flags = parser.parse_args()
    _native, native = kernels(flags.module)
    reason = _native.cuda_reason() if flags.device == "cuda" else None if _native.C is not None else _native.MISSING
    if flags.can_run or reason:
        print(reason or "the kernels are available")
        return int(reason is not None)
    wrong = count = 0
    for dtype, limit in LIMIT.items():
        for seed, case in enumerate(CASES):
            for name, (found, true) in results(native, case, dtype, flags.device, seed).items():
                error = ((found.cpu().double() - true).norm() / true.norm()).item()
                count += 1
                if not error <= limit:
                    wrong += 1
                    print(f"{name} {dtype} {case}: relative error {error:.1e} exceeds {limit:.0e}")
    print(f"{count} results on {flags.device}, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
