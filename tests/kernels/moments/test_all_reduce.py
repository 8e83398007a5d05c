"""all_reduce over gloo processes: every rank ends with the moments of a single process that sees all rows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mir_kernels.ops.moments import StreamingMoments

RANK = Path(__file__).parent / "all_reduce_rank.py"


@pytest.mark.parametrize("split", [[0, 700, 1500], [0, 1500, 1500]], ids=["uneven", "one rank without rows"])
def test_two_processes_have_the_moments_of_one(split, tmp_path):
    x = torch.randn(1500, 70, dtype=torch.float64) @ torch.randn(70, 70, dtype=torch.float64) + 100
    torch.save(x, tmp_path / "x.pt")
    command = [sys.executable, str(RANK), str(tmp_path), *map(str, split)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*command, str(rank)], env=env, stderr=subprocess.PIPE, text=True) for rank in range(2)]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors
    one = StreamingMoments(70)
    one.update(x)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for result in results:
        assert result["count"] == 1500
        torch.testing.assert_close(result["mean"], one.mean, rtol=1e-9, atol=0)
        torch.testing.assert_close(result["covariance"], one.covariance(), rtol=1e-9, atol=1e-9)
    assert torch.equal(results[0]["covariance"], results[1]["covariance"])


def test_without_a_process_group_it_says_what_to_do():
    with pytest.raises(RuntimeError, match="init_process_group"):
        StreamingMoments(3).all_reduce()
