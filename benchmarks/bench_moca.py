"""Benchmark MoCa and its fusion with residual add and RMSNorm: the published formula, boolean indexing, torch.compile.

    python benchmarks/bench_moca.py     # bf16, half of the rows vision: (16384, 2048) on a CPU, (16384, 4096) on a GPU

The floor is the faster of two copies of the same bytes. Bytes are the minimum of the job: for the forward pass in place
2 passes over the vision rows (read x, write x); for the backward pass 3 over the vision rows (read grad and x, write
dx) and 2 over the text rows (dx is a new tensor). moca_spread.py measures the spread of the first case over processes.
The backward pass is timed alone, through autograd, with dscale and dshift. Errors are the largest of all results,
against float64. "moca in place, training" covers the end of a decoder layer, forward and backward, with its residual
addition. "1000 calls" uses (4, 64), where Python and the launch dominate: read ms as microseconds per call.
On a CPU the allocator is set to keep freed memory; otherwise page faults of the results would dominate.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
from collections.abc import Callable

import torch
import torch._functorch.config
from torch import Tensor

import counts
import harness
from mir_kernels import _native, add_moca_rms_norm, moca
from mir_kernels.ops.moca import native
from mir_kernels.ops.moca.launch import ADD_MOCA_RMS_NORM, MOCA

LIMIT = 1e-2  # relative, bf16
CALLS = 1000
PAST_CACHES = "copy past the caches"  # by non-temporal stores
Results = Tensor | tuple[Tensor, ...]


def main() -> int:
    parser = harness.arguments(__doc__, "moca")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--hidden", type=int, default=None, help="default: 2048 on a CPU, 4096 on a GPU")
    parser.add_argument("--operations", nargs="+", default=list(JOBS), choices=JOBS, help="operations to time")
    flags = parser.parse_args()
    hidden = flags.hidden or (4096 if flags.device == "cuda" else 2048)
    torch._functorch.config.donated_buffer = False  # lets a compiled graph run backward twice
    if flags.device == "cpu":
        keep_freed_memory()
    inputs = Inputs(flags.tokens, hidden, flags.device)
    case = f"({flags.tokens}, {hidden}) bf16, {inputs.vision.sum().item()} vision rows"
    common = {"seconds": flags.seconds, "device": flags.device, "rounds": (15, 200)}
    rows = []
    for name in flags.operations:
        measure = JOBS[name]
        if measure is None:
            calls = harness.without(small_calls(Inputs(4, 64, flags.device)), flags.skip)
            rows += harness.compare(name, "(4, 64) bf16", calls, **common)
            harness.write_csv(rows, flags.out)
            continue
        rivals, moved = measure(inputs)
        entries = harness.without([*copies_of(moved, flags.device), *rivals], flags.skip)
        rows += harness.compare(name, case, entries, bytes_moved=moved, **common)
        harness.write_csv(rows, flags.out)
    harness.print_rows(rows)
    return harness.exit_code(rows)


class Inputs:
    """Random tokens, with images in two runs as in a batch of conversations. The scale is near 1, because in-place
    calls are repeated."""

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
        """The minimal bytes that an operation of counts.py moves on these inputs."""
        return count(self.rows, self.vision_rows, self.hidden).bytes


def formula(x: Tensor, scale: Tensor, shift: Tensor, vision: Tensor) -> Tensor:
    """The published code, with mask and arithmetic in float32."""
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


def copies_of(moved: int, device: str) -> list[harness.Rival]:
    """Copies that read half of the bytes and write half: torch's, and on a CPU one whose stores bypass the caches.

    An ordinary store to memory reads the line first, so torch's copy moves 1.5 times the bytes.
    """
    source = torch.randint(0, 255, (moved // 2,), dtype=torch.uint8, device=device)
    target = source.clone()  # maps every page before the first copy
    copies = [harness.Rival("copy of the same bytes", lambda i: target.copy_(source))]
    if device == "cpu" and _native.C is not None:
        d = 2048
        n = source.numel() // (2 * d)
        vector, unmasked = torch.ones(d), torch.zeros(n, dtype=torch.bool)
        rows, copied = (tensor[: 2 * n * d].view(torch.bfloat16).view(n, d) for tensor in (source, target))
        copies.append(harness.Rival(PAST_CACHES, lambda i: native.forward(rows, vector, vector, unmasked, copied)))
    return copies


def rival(name: str, call: Callable[[], Results], exact: Results) -> harness.Rival:
    """A rival that computes `exact`, which is float64; nothing runs until its error or time is requested."""
    return harness.Rival(name, lambda i: call(), lambda: relative(call(), exact), LIMIT)


def forward_in_place(t: Inputs) -> tuple[list[harness.Rival], int]:
    vectors = (t.scale.detach(), t.shift.detach(), t.vision)
    calls = moca_in_place_calls(t.device)
    calls |= {"published formula": lambda x, *v: x.copy_(formula(x, *v)), "boolean indexing": indexing_}
    calls["torch.compile(where)"] = harness.compiled(where_)
    exact = where(t.x.double(), *(v.double() for v in vectors[:2]), t.vision)
    rivals = [rival(name, functools.partial(call, t.x.clone(), *vectors), exact) for name, call in calls.items()]
    return rivals, t.bytes(counts.moca_forward_in_place)


def forward(t: Inputs) -> tuple[list[harness.Rival], int]:
    arguments = (t.x, t.scale.detach(), t.shift.detach(), t.vision)
    exact = where(*(v.double() for v in arguments[:3]), t.vision)
    calls = moca_calls(t.device) | RIVALS
    rivals = [rival(name, functools.partial(call, *arguments), exact) for name, call in calls.items()]
    return rivals, t.bytes(counts.moca_forward)


def backward(t: Inputs) -> tuple[list[harness.Rival], int]:
    inputs = [t.x.clone().requires_grad_(), t.scale, t.shift]
    exact = gradients(lambda *v: where(*v, t.vision), [v.detach().double() for v in inputs], [t.grad.double()])
    rivals = backward_rivals(moca_calls(t.device) | RIVALS, inputs, (t.vision,), [t.grad], exact)
    return rivals, t.bytes(counts.moca_backward)


def training_in_place(t: Inputs) -> tuple[list[harness.Rival], int]:
    inputs = [t.x.clone().requires_grad_(), t.residual.clone().requires_grad_(), t.scale, t.shift]
    calls = moca_in_place_calls(t.device)
    calls |= {f"{name}, a new tensor": call for name, call in list(moca_calls(t.device).items())[:1]}
    calls |= {**RIVALS, "torch.compile(where)": where}
    exact = gradients(
        lambda x, r, *v: where(x + r, *v, t.vision), [v.detach().double() for v in inputs], [t.grad.double()]
    )
    rivals = []
    for name, call in calls.items():
        layer = layer_end(call, t.vision)
        if "compile" in name:
            layer = harness.compiled(layer)
        rivals.append(rival(name, lambda layer=layer: torch.autograd.grad(layer(*inputs), inputs, t.grad), exact))
    added = counts.masked_rows(t.rows, t.vision_rows, t.hidden, 3, 3).bytes
    return rivals, added + t.bytes(counts.moca_forward_in_place) + t.bytes(counts.moca_backward)


def layer_end(call: Callable, vision: Tensor) -> Callable:
    return lambda x, residual, scale, shift: call(x + residual, scale, shift, vision)


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
    rivals = [rival(name, functools.partial(call, *arguments), exact) for name, call in fused_calls(t.device).items()]
    unmasked = (*arguments[:2], arguments[5])
    exact = plain_norm(*(v.double() for v in unmasked))
    for name, call in plain_norms(t.device).items():
        rivals.append(rival(name, functools.partial(call, *unmasked), exact))
    if liger := liger_norm(t):
        rivals.append(harness.Rival("Liger, no MoCa", lambda i: liger(t.x, t.residual)))
    return rivals, t.bytes(counts.add_moca_rms_norm_forward)


def plain_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Residual add and RMSNorm by torch."""
    h = x + residual
    return torch.nn.functional.rms_norm(h, (h.shape[-1],), weight, 1e-6), h


def plain_norms(device: str) -> dict[str, Callable]:
    """add + RMSNorm without MoCa; on a GPU one kernel that moves the same bytes as `add_moca_rms_norm`."""
    if device != "cuda":
        return {"add + RMSNorm, no MoCa (torch)": plain_norm}
    from add_rms_norm import add_rms_norm

    return {"add + RMSNorm, no MoCa (triton)": add_rms_norm}


def fused_backward(t: Inputs) -> tuple[list[harness.Rival], int]:
    inputs = [t.x.clone().requires_grad_(), t.residual.clone().requires_grad_(), t.scale, t.shift, t.weight]
    calls = {n: lambda x, r, u, v, w, m, c=c: c(x, r, u, v, m, w) for n, c in fused_calls(t.device).items()}
    wide = [v.detach().double() for v in inputs]
    upstream = [t.grad, t.grad_h]
    exact = gradients(
        lambda x, r, u, v, w: separate(x, r, u, v, t.vision, w), wide, [g.double() for g in upstream]
    )  # in float64 Llama's intermediate rounding is negligible
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


def moca_calls(device: str) -> dict[str, Callable]:
    return {f"ours, {b}": functools.partial(moca, backend=b) for b in harness.backends(MOCA, device)}


def moca_in_place_calls(device: str) -> dict[str, Callable]:
    return {name: functools.partial(call, inplace=True) for name, call in moca_calls(device).items()}


def fused_calls(device: str) -> dict[str, Callable]:
    backends = harness.backends(ADD_MOCA_RMS_NORM, device)
    calls: dict[str, Callable] = {f"ours, {b}": functools.partial(add_moca_rms_norm, backend=b) for b in backends}
    return calls | {"separate operations": separate, "torch.compile(separate)": harness.compiled(separate)}


RIVALS: dict[str, Callable] = {
    "published formula": formula,
    "boolean indexing": indexing,
    "torch.compile(where)": harness.compiled(where),
}


def backward_rivals(
    calls: dict[str, Callable], inputs: list[Tensor], constants: tuple, upstream: list[Tensor], exact: Results
) -> list[harness.Rival]:
    """One rival per call; its forward runs once, before the first backward."""

    def backward_of(call: Callable) -> Callable[[], Results]:
        outputs = functools.cache(lambda: results(call(*inputs, *constants)))
        return lambda: torch.autograd.grad(outputs(), inputs, upstream, retain_graph=True)

    return [rival(name, backward_of(call), exact) for name, call in calls.items()]


def gradients(function: Callable, inputs: list[Tensor], upstream: list[Tensor]) -> Results:
    leaves = [v.requires_grad_() for v in inputs]
    return torch.autograd.grad(function(*leaves), leaves, upstream)


def results(found: Results) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def relative(found: Results, exact: Results) -> float:
    """The largest ||found - exact|| / ||exact|| of several results."""
    pairs = zip(results(found), results(exact), strict=True)
    return max(((f.double() - e).norm() / e.norm()).item() for f, e in pairs)


def keep_freed_memory() -> None:
    """With glibc, disable mmap for large blocks and keep freed memory, as a caching allocator does. Otherwise no-op."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def liger_norm(t: Inputs) -> torch.nn.Module | None:
    """Liger-Kernel's fused add + RMSNorm, which has no MoCa; None if it is not installed or there is no GPU."""
    if t.device != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers.fused_add_rms_norm import LigerFusedAddRMSNorm

    return LigerFusedAddRMSNorm(t.hidden).to(t.device, torch.bfloat16)


# By the operation's name in the CSV; None: the small calls, which have separate inputs.
JOBS: dict[str, Callable[[Inputs], tuple[list[harness.Rival], int]] | None] = {
    "moca forward in place": forward_in_place,
    "moca forward": forward,
    "moca backward": backward,
    "moca in place, training": training_in_place,
    "add_moca_rms_norm forward": fused_forward,
    "add_moca_rms_norm backward": fused_backward,
    f"{CALLS} calls": None,
}

if __name__ == "__main__":
    sys.exit(main())
