"""Every native MoCa kernel once, in every dtype and on odd sizes, against float64: what compute-sanitizer runs.

compute-sanitizer --tool memcheck python benchmarks/check_native.py --device cuda
"""

from __future__ import annotations

import argparse
import sys

import torch

from mir_kernels.moca import native

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-13}
SHAPES = [(1, 1), (37, 7), (129, 576), (65, 1032)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    device = parser.parse_args().device
    generator, wrong = torch.Generator().manual_seed(0), 0
    for dtype, limit in LIMIT.items():
        for rows, d in SHAPES:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            x, grad = (torch.randn(rows, d, generator=generator).to(dtype) for _ in range(2))
            scale, shift = (torch.randn(d, generator=generator).to(wide) for _ in range(2))
            mask = torch.arange(rows) % 2 == 0
            on = [t.to(device) for t in (x, grad, scale, shift, mask)]
            out, dx = (torch.full_like(on[0], float("nan")) for _ in range(2))
            native.forward(on[0], on[2], on[3], on[4], out)
            sums = native.backward(on[1], on[0], on[2], on[4], dx)
            m = mask[:, None]
            exact = (
                torch.where(m, x.double() * scale.double() + shift.double(), x.double()),
                torch.where(m, grad.double() * scale.double(), grad.double()),
                (grad.double() * x.double() * m).sum(0),
                (grad.double() * m).sum(0),
            )
            for name, found, true in zip(("out", "dx", "dscale", "dshift"), (out, dx, *sums), exact, strict=True):
                error = ((found.cpu().double() - true).norm() / true.norm()).item()
                if not error <= limit:
                    wrong += 1
                    print(f"{name} {dtype} ({rows}, {d}): relative error {error:.1e} beyond {limit:.0e}")
    print(f"{4 * len(LIMIT) * len(SHAPES)} results on {device}, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
