"""One of the four ranks of test_reductions.py: runs the cases and writes their results. Arguments: folder, rank."""

import copy
import pickle
import sys
from pathlib import Path

import torch
from torch import distributed

from mir_kernels.ops.moments import StreamingMoments, reduction

D, RANKS = 5, 4
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
NODES = [distributed.new_group(ranks) for ranks in ((0, 1), (2, 3))]
ACROSS = [distributed.new_group(ranks) for ranks in ((0, 2), (1, 3))]
ALONE = [distributed.new_group([one]) for one in range(RANKS)]
node, across, alone = NODES[rank // 2], ACROSS[rank % 2], ALONE[rank]


def rows(part: int, of: int = rank) -> torch.Tensor:
    """The rows of a rank at step `part`."""
    generator = torch.Generator().manual_seed(10 * part + of)
    return torch.randn(30 + of, D, generator=generator, dtype=torch.float64) + 7 * part


def fed(*parts: int) -> StreamingMoments:
    moments = StreamingMoments(D)
    for part in parts:
        moments.update(rows(part))
    return moments


def is_of(moments: StreamingMoments, *parts: int, ranks=range(RANKS)) -> bool:
    """Whether `moments` holds the rows of these steps of these ranks exactly once."""
    x = torch.cat([rows(part, of) for part in parts for of in ranks])
    right = moments.count == len(x)
    right &= torch.allclose(moments.mean, x.mean(0), rtol=1e-12, atol=1e-12)
    return right and torch.allclose(moments.covariance(), torch.cov(x.T), rtol=1e-9, atol=1e-9)


def refusal(moments: StreamingMoments, group=None) -> str:
    """The message of all_reduce; nothing may have changed."""
    before = moments.state_dict()
    try:
        moments.all_reduce(group)
    except RuntimeError as error:
        after = moments.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        return str(error)
    return ""


def again():
    moments = fed(1)
    moments.all_reduce()
    first = is_of(moments, 1)
    said = [refusal(moments)]
    moments.update(rows(2))
    said += [refusal(moments), refusal(moments, node)]
    moments.reset()
    moments.update(rows(3))
    moments.all_reduce()
    return {"right": first and is_of(moments, 3), "said": said}


def copies_on_the_way():
    moments, right = StreamingMoments(D), True
    for part in (1, 2, 3):
        moments.update(rows(part))
        total = copy.deepcopy(moments)
        total.all_reduce()
        right &= is_of(total, *range(1, part + 1)) and is_of(moments, *range(1, part + 1), ranks=[rank])
    moments.all_reduce()
    return {"right": right and is_of(moments, 1, 2, 3)}


def node_by_node():
    moments = fed(1, 2)
    moments.all_reduce(node)
    right = is_of(moments, 1, 2, ranks=[0, 1] if rank < 2 else [2, 3])
    said = [refusal(moments), refusal(moments, node)]
    moments.all_reduce(across)
    return {"right": right and is_of(moments, 1, 2), "said": [*said, refusal(moments), refusal(moments, across)]}


def one_rank_of_each_node():
    moments = fed(1)
    moments.all_reduce(node)
    if rank in (0, 2):
        moments.all_reduce(across)
        assert is_of(moments, 1)
    return {"right": True, "said": [refusal(moments)]}


def going_on_from_a_saved_total():
    saved = fed(1)
    saved.all_reduce()
    state, one, every = saved.state_dict(), StreamingMoments(D), StreamingMoments(D)
    if rank == 2:
        one.load_state_dict(state)
    one.update(rows(2))
    one.all_reduce()
    x = is_of(one, 1, 2)
    every.load_state_dict(state)
    return {"right": x, "said": [refusal(every)]}


def one_that_was_kept():
    moments = fed(1)
    moments.all_reduce()
    if rank != 1:
        moments.reset()
    moments.update(rows(2))
    moments.all_reduce()
    return {"right": is_of(moments, 1, 2)}


def merged_moments_remember():
    total, moments = fed(1), StreamingMoments(D)
    total.all_reduce()
    moments.merge(total)
    moments.update(rows(2))
    said = [refusal(moments)]
    before = moments.state_dict()
    try:
        moments.merge(total)
    except ValueError as error:
        said.append(str(error))
    after = moments.state_dict()
    return {"right": all(torch.equal(value, after[name]) for name, value in before.items()), "said": said}


def copies_remember_and_reset_forgets():
    moments = fed(1)
    right = "reduced" not in moments.state_dict()
    moments.all_reduce()
    loaded = StreamingMoments(D)
    loaded.load_state_dict(moments.state_dict())
    kept = [copy.deepcopy(moments), pickle.loads(pickle.dumps(moments)), loaded, copy.copy(moments).to("cpu")]
    said = [refusal(one) for one in kept]
    moments.reset()
    right &= "reduced" not in moments.state_dict()
    moments.update(rows(2))
    loaded.load_state_dict(moments.state_dict())
    loaded.all_reduce()
    moments.all_reduce()
    return {"right": right and is_of(moments, 2) and is_of(loaded, 2), "said": said}


def many_totals():
    """More totals than fit with the sums."""
    grand, right = StreamingMoments(D), True
    for part in range(1, reduction.ROOM + 4):
        total = fed(part)
        total.all_reduce()
        grand.merge(total)
    said = [refusal(grand)]
    if rank != 3:
        grand.reset()
    grand.all_reduce()
    return {"right": right and is_of(grand, *range(1, reduction.ROOM + 4)), "said": [*said, refusal(grand)]}


def rows_that_are_not_finite():
    moments = fed(1)
    if rank == 1:
        moments.update(torch.tensor([[1.0, float("nan"), 0.0, float("inf"), 2.0]]))
    moments.all_reduce()
    said = []
    for read in (lambda: moments.mean, moments.covariance):
        try:
            read()
        except ValueError as error:
            said.append(str(error))
    return {"right": moments.count == sum(len(rows(1, of)) for of in range(RANKS)) + 1, "said": said}


def nothing_to_remember():
    moments = StreamingMoments(D)
    moments.all_reduce()
    moments.all_reduce()
    if rank == 0:
        moments.update(rows(1))
    moments.all_reduce(alone)
    moments.all_reduce(alone)
    moments.all_reduce()
    return {"right": is_of(moments, 1, ranks=[0]), "said": [refusal(moments)]}


def two_journeys():
    """Still two sums over the ranks: one for counts and sums, one for second moments."""
    calls, real = [], distributed.all_reduce
    distributed.all_reduce = lambda tensor, **keywords: (calls.append(tensor.numel()), real(tensor, **keywords))[1]
    try:
        moments = fed(1)
        moments.all_reduce()
    finally:
        distributed.all_reduce = real
    return {"right": is_of(moments, 1) and len(calls) == 2}


def who_is_no_member():
    moments = fed(1)
    before = moments.state_dict()
    moments.all_reduce(NODES[0])
    if rank < 2:
        return {"right": is_of(moments, 1, ranks=[0, 1])}
    after = moments.state_dict()
    return {"right": all(torch.equal(value, after[name]) for name, value in before.items())}


CASES = (
    *(again, copies_on_the_way, node_by_node, one_rank_of_each_node, going_on_from_a_saved_total, one_that_was_kept),
    *(merged_moments_remember, copies_remember_and_reset_forgets, many_totals, rows_that_are_not_finite),
    *(nothing_to_remember, two_journeys, who_is_no_member),
)
torch.save({case.__name__: case() for case in CASES}, folder / f"{rank}.pt")
distributed.destroy_process_group()
