"""MoCa and its fusion with residual add and RMSNorm against the published formula, boolean indexing and torch.compile.

    python benchmarks/bench_moca.py     # bf16, half of the rows vision: (16384, 2048) on a CPU, (16384, 4096) on a GPU

The floor is a copy that moves the same bytes. Bytes are the fewest that the job takes: 2 passes over the vision rows
forward in place (read x, write x), 3 backward (read grad and x, write dx), 2 over the text rows (dx is a new tensor).
Backward is timed alone, through autograd, with dscale and dshift; errors are the largest of all results in float64.
"moca in place, training" is what the end of a decoder layer takes both ways, its residual addition included. "1000
calls" are on (4, 64), where the time is Python's and the launch's: its milliseconds are microseconds of one.
On a CPU the allocator is told to keep freed memory: else every rival mostly measures page faults of its results.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import counts
import harness
from mir_kernels.moca import OPERATIONS, add_moca_rms_norm, moca

LIMIT = 1e-2  # relative, bf16
CALLS = 1000


def main() -> int:
    parser = harness.arguments(__doc__, "moca")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--hidden", type=int, default=None, help="default: 2048 on a CPU, 4096 on a GPU")
    flags = parser.parse_args()
    hidden = flags.hidden or (4096 if flags.device == "cuda" else 2048)
    torch._functorch.config.donated_buffer = False  # a compiled graph may then run backward twice, as this file does
    if flags.device == "cpu":
        keep_freed_memory()
    inputs = Inputs(flags.tokens, hidden, flags.device)
    case = f"({flags.tokens}, {hidden}) bf16, {inputs.vision.sum().item()} vision rows"
    common = {"seconds": flags.seconds, "device": flags.device, "rounds": (15, 200)}
    rows = []
    for name, measure in (
        ("moca forward in place", forward_in_place),
        ("moca forward", forward),
        ("moca backward", backward),
        ("moca in place, training", training_in_place),
        ("add_moca_rms_norm forward", fused_forward),
        ("add_moca_rms_norm backward", fused_backward),
    ):
        rivals, moved = measure(inputs)
        rows += harness.compare(name, case, [copy_of(moved, flags.device), *rivals], bytes_moved=moved, **common)
        harness.write_csv(rows, flags.out)
    rows += harness.compare(f"{CALLS} calls", "(4, 64) bf16", small_calls(Inputs(4, 64, flags.device)), **common)
    harness.write_csv(rows, flags.out)
    harness.print_rows(rows)
    return harness.exit_code(rows)


class Inputs:
    """Random tokens, the images in two runs as in a batch of conversations. Scale near 1: in-place calls repeat."""

    def __init__(self, tokens: int, hidden: int, device: str) -> None:
        torch.manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device)

        self.x, self.residual, self.grad, self.grad_h = (normal(tokens, hidden).bfloat16() for _ in range(4))
        self.scale = (1 + 1e-3 * normal(hidden)).requires_grad_()
        self.shift = (1e-3 * normal(hidden)).requires_grad_()
        self.weight = (1 + 0.1 * normal(hidden)).bfloat16().requires_grad_()
        self.vision = torch.zeros(tokens, dtype=torch.bool, device=device)
        self.vision[tokens // 8 : tokens // 8 + tokens // 4] = True
        self.vision[tokens // 2 : tokens // 2 + tokens // 4] = True
        self.rows, self.vision_rows = tokens, int(self.vision.sum())
        self.hidden, self.device = hidden, device

    def bytes(self, count: Callable[[int, int, int], counts.Count]) -> int:
        """The fewest bytes that an operation of counts.py moves on these inputs."""
        return count(self.rows, self.vision_rows, self.hidden).bytes


def formula(x: Tensor, scale: Tensor, shift: Tensor, vision: Tensor) -> Tensor:
    """As the published code has it, the mask and the arithmetic in float32."""
    m = vision.float()[:, None]
    return ((1 - m) * x + m * (scale * x + shift)).to(x.dtype)


def indexing(x: Tensor, scale: Tensor, shift: Tensor, vision: Tensor) -> Tensor:
    out = x.clone()
    out[vision] = (x[vision] * scale + shift).to(x.dtype)
    return out


def indexing_(x: Tensor, scale: Tensor, shift: Tensor, vision: Tensor) -> Tensor:
    x[vision] = (x[vision] * scale + shift).to(x.dtype)
    return x


def where(x: Tensor, scale: Tensor, shift: Tensor, vision: Tensor) -> Tensor:
    return torch.where(vision[:, None], (x * scale + shift).to(x.dtype), x)


def where_(x: Tensor, scale: Tensor, shift: Tensor, vision: Tensor) -> Tensor:
    return x.copy_(where(x, scale, shift, vision))


def separate(x: Tensor, residual: Tensor, scale: Tensor, shift: Tensor, vision: Tensor, weight: Tensor) -> tuple:
    """Residual add, MoCa by torch.where, Llama's RMSNorm."""
    h = where(x + residual, scale, shift, vision)
    wide = h.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype), h


def ours(operation: int, device: str) -> list[str]:
    """The backends of an operation that run here."""
    chosen = OPERATIONS[operation]
    return [b for b in chosen.orders[device] if chosen.reason(b, torch.device(device)) is None]


def copy_of(moved: int, device: str) -> harness.Rival:
    source = torch.randint(0, 255, (moved // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return harness.Rival("copy of the same bytes", lambda i: target.copy_(source))


def forward_in_place(t: Inputs) -> tuple[list[harness.Rival], int]:
    vectors = (t.scale.detach(), t.shift.detach(), t.vision)
    calls = {f"ours, {b}": lambda x, *v, b=b: moca(x, *v, inplace=True, backend=b) for b in ours(0, t.device)}
    calls |= {"published formula": lambda x, *v: x.copy_(formula(x, *v)), "boolean indexing": indexing_}
    calls["torch.compile(where)"] = torch.compile(where_)
    exact = where(t.x.double(), *(v.double() for v in vectors[:2]), t.vision)
    rivals = []
    for name, call in calls.items():
        x = t.x.clone()
        error = relative([call(x, *vectors)], [exact])
        rivals.append(harness.Rival(name, lambda i, c=call, x=x: c(x, *vectors), error, LIMIT))
    return rivals, t.bytes(counts.moca_forward_in_place)


def forward(t: Inputs) -> tuple[list[harness.Rival], int]:
    arguments = (t.x, t.scale.detach(), t.shift.detach(), t.vision)
    exact = where(*(v.double() for v in arguments[:3]), t.vision)
    calls = {f"ours, {b}": lambda *v, b=b: moca(*v, backend=b) for b in ours(0, t.device)} | RIVALS
    rivals = [harness.Rival(n, lambda i, c=c: c(*arguments), relative([c(*arguments)], [exact]), LIMIT)
              for n, c in calls.items()]  # fmt: skip
    return rivals, t.bytes(counts.moca_forward)


def backward(t: Inputs) -> tuple[list[harness.Rival], int]:
    inputs = [t.x.clone().requires_grad_(), t.scale, t.shift]
    calls = {f"ours, {b}": lambda *v, b=b: moca(*v, backend=b) for b in ours(0, t.device)} | RIVALS
    exact = gradients(lambda *v: (where(*v, t.vision),), [v.detach().double() for v in inputs], [t.grad.double()])
    return backward_rivals(calls, inputs, (t.vision,), [t.grad], exact), t.bytes(counts.moca_backward)


def training_in_place(t: Inputs) -> tuple[list[harness.Rival], int]:
    inputs = [t.x.clone().requires_grad_(), t.residual.clone().requires_grad_(), t.scale, t.shift]
    calls: dict[str, Callable] = {
        f"ours, {b}": lambda h, *v, b=b: moca(h, *v, t.vision, inplace=True, backend=b) for b in ours(0, t.device)
    }
    calls |= {f"ours, {b}, a new tensor": lambda *v, b=b: moca(*v, t.vision, backend=b) for b in ours(0, t.device)[:1]}
    calls |= {n: lambda *v, c=c: c(*v, t.vision) for n, c in {**RIVALS, "torch.compile(where)": where}.items()}
    exact = gradients(
        lambda x, r, *v: where(x + r, *v, t.vision), [v.detach().double() for v in inputs], [t.grad.double()]
    )
    rivals = []
    for name, call in calls.items():
        layer = layer_end(call)
        if "compile" in name:
            layer = torch.compile(layer)

        def run(i: int, layer: Callable = layer) -> tuple:
            return torch.autograd.grad(layer(*inputs), inputs, t.grad)

        rivals.append(harness.Rival(name, run, lambda run=run: relative(run(0), exact), LIMIT))
    added = counts.masked_rows(t.rows, t.vision_rows, t.hidden, 3, 3).bytes
    return rivals, added + t.bytes(counts.moca_forward_in_place) + t.bytes(counts.moca_backward)


def layer_end(call: Callable) -> Callable:
    return lambda x, residual, scale, shift: call(x + residual, scale, shift)


def small_calls(t: Inputs) -> list[harness.Rival]:
    plain = t.x, t.scale.detach(), t.shift.detach(), t.vision
    x, weight = t.x.clone().requires_grad_(), t.weight.detach()
    fused = (t.x, t.residual, *plain[1:], weight)
    calls: dict[str, Callable] = {
        "torch.add": lambda: torch.add(t.x, t.residual),
        "ours, moca": lambda: moca(*plain),
        "ours, moca in place": lambda: moca(*plain, inplace=True),
        "ours, moca, with gradients": lambda: moca(x, t.scale, t.shift, t.vision),
        "ours, add_moca_rms_norm": lambda: add_moca_rms_norm(*fused),
        "torch.nn.functional.rms_norm": lambda: torch.nn.functional.rms_norm(t.x, (t.hidden,), weight),
        "torch.where(x * scale + shift)": lambda: where(*plain),
    }

    def repeated(call: Callable) -> Callable[[int], None]:
        def run(i: int) -> None:
            for _ in range(CALLS):
                call()

        return run

    return [harness.Rival(name, repeated(call)) for name, call in calls.items()]


def fused_forward(t: Inputs) -> tuple[list[harness.Rival], int]:
    arguments = (t.x, t.residual, t.scale.detach(), t.shift.detach(), t.vision, t.weight.detach())
    exact = separate(*(v if v.dtype == torch.bool else v.double() for v in arguments))
    rivals = [harness.Rival(n, lambda i, c=c: c(*arguments), relative(c(*arguments), exact), LIMIT)
              for n, c in fused_calls(t).items()]  # fmt: skip
    if liger := liger_norm(t):
        rivals.append(harness.Rival("Liger, no MoCa", lambda i: liger(t.x, t.residual)))
    return rivals, t.bytes(counts.add_moca_rms_norm_forward)


def fused_backward(t: Inputs) -> tuple[list[harness.Rival], int]:
    inputs = [t.x.clone().requires_grad_(), t.residual.clone().requires_grad_(), t.scale, t.shift, t.weight]
    calls = {n: lambda x, r, u, v, w, m, c=c: c(x, r, u, v, m, w) for n, c in fused_calls(t).items()}
    wide = [v.detach().double() for v in inputs]
    upstream = [t.grad, t.grad_h]
    exact = gradients(
        lambda x, r, u, v, w: separate(x, r, u, v, t.vision, w), wide, [g.double() for g in upstream]
    )  # in float64 Llama's rounding is none
    rivals = backward_rivals(calls, inputs, (t.vision,), upstream, exact)
    if liger := liger_norm(t):
        outputs = liger(*inputs[:2])
        wanted = [*inputs[:2], liger.weight]
        rivals.append(
            harness.Rival(
                "Liger, no MoCa",
                lambda i: torch.autograd.grad(outputs, wanted, upstream, retain_graph=True),
            )
        )
    return rivals, t.bytes(counts.add_moca_rms_norm_backward)


def fused_calls(t: Inputs) -> dict[str, Callable]:
    calls: dict[str, Callable] = {
        f"ours, {b}": lambda *v, b=b: add_moca_rms_norm(*v, backend=b) for b in ours(1, t.device)
    }
    return calls | {"separate operations": separate, "torch.compile(separate)": torch.compile(separate)}


RIVALS: dict[str, Callable] = {
    "published formula": formula,
    "boolean indexing": indexing,
    "torch.compile(where)": torch.compile(where),
}


def backward_rivals(
    calls: dict[str, Callable], inputs: list[Tensor], constants: tuple, upstream: list[Tensor], exact: list[Tensor]
) -> list[harness.Rival]:
    """One rival a call: its forward runs once here, its backward each time."""
    rivals = []
    for name, call in calls.items():
        found = call(*inputs, *constants)
        outputs = found if isinstance(found, tuple) else (found,)

        def run(i: int, outputs: tuple = outputs) -> tuple:
            return torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)

        rivals.append(harness.Rival(name, run, relative(run(0), exact), LIMIT))
    return rivals


def gradients(function: Callable, inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    leaves = [v.requires_grad_() for v in inputs]
    return list(torch.autograd.grad(function(*leaves), leaves, upstream))


def relative(found, exact) -> float:
    """The largest ||found - exact|| / ||exact|| of several results."""
    pairs = zip(found, exact, strict=True)
    return max(((f.double() - e).norm() / e.norm()).item() for f, e in pairs)


def keep_freed_memory() -> None:
    """glibc: no mmap for large blocks and no return to the system, as a caching allocator does. Elsewhere nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def liger_norm(t: Inputs) -> torch.nn.Module | None:
    """Liger-Kernel's fused add + RMSNorm, which has no MoCa, where it is installed and there is a GPU."""
    if t.device != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers.fused_add_rms_norm import LigerFusedAddRMSNorm

    return LigerFusedAddRMSNorm(t.hidden).to(t.device, torch.bfloat16)


if __name__ == "__main__":
    sys.exit(main())
