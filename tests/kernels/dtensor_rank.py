"""The code that each rank of test_dtensor.py runs."""

from pathlib import Path

import torch

from kernels.edge_calls import CALLS, RESIDUAL, SCALE, SHIFT, WEIGHT
from mir_kernels import add_moca_rms_norm, moca

RANKS = 2


def compare(rank: int, folder: str) -> None:
    """Write all problems, one per line, to `folder`/`rank`."""
    problems: list[str] = []
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    for name, call in CALLS.items():
        cuts = [Replicate(), *(Shard(i) for i in range(2 if "moca" in name or name == "token_norms" else 1))]
        for cut in cuts:

            def whole(tensor, at=None, cut=cut):
                return distribute_tensor(tensor, mesh, [Replicate() if at is None else cut])

            found = call.function(whole(call.tensor, 0), whole)
            wanted = call.function(call.tensor)
            for one, other in zip(*(v if isinstance(v, tuple) else (v,) for v in (found, wanted)), strict=True):
                if type(one) is not DTensor or one.placements != (cut,) or not torch.equal(one.full_tensor(), other):
                    problems.append(f"{name} {cut}: {one} {other}")
    gradients(mesh, problems)
    refusals(mesh, problems)
    distributed.destroy_process_group()
    Path(folder, str(rank)).write_text("\n".join(problems))


def gradients(mesh, problems) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    x = CALLS["moca"].tensor
    mask = torch.arange(12, dtype=torch.int64, device="cpu").view(4, 3) % 3 != 0
    results = []
    for cut in (None, Shard(0), Shard(1)):

        def place(tensor, at, cut=cut):
            return tensor.clone() if cut is None else distribute_tensor(tensor, mesh, [at])

        leaves = [place(t, cut).requires_grad_() for t in (x, RESIDUAL)]
        leaves += [place(t, Replicate()).requires_grad_() for t in (SCALE, SHIFT, WEIGHT)]
        placed = place(mask, cut)
        out, h = add_moca_rms_norm(leaves[0], leaves[1], leaves[2], leaves[3], placed, leaves[4])
        loss = out.square().sum() + moca(h, leaves[2], leaves[3], placed).square().sum()
        found = torch.autograd.grad(loss, leaves)
        results.append([g if cut is None else g.full_tensor() for g in found])
    for cut, result in zip(("0", "1"), results[1:], strict=True):
        for i, (one, other) in enumerate(zip(result, results[0], strict=True)):
            if not torch.allclose(one, other, rtol=1e-5, atol=1e-5):
                problems.append(f"gradient {i} cut along {cut}: {one} {other}")


def refusals(mesh, problems) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    from mir_kernels import StreamingMoments

    cut = distribute_tensor(CALLS["moca"].tensor, mesh, [Shard(0)])
    tries = {
        "expected all tensors to be DTensors or none": lambda: CALLS["moca"].function(cut),
        "to_local": lambda: StreamingMoments(6, device="cpu").update(cut),
    }
    for text, attempt in tries.items():
        try:
            attempt()
            problems.append(f"was accepted: {text}")
        except TypeError as error:
            if text not in str(error):
                problems.append(str(error))
