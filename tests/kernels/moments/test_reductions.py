"""Repeated all_reduce: rows are counted once, or every rank raises the same error and keeps its state."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RANK = Path(__file__).parent / "reductions_rank.py"
TWICE = "all_reduce: ranks . and . of the group both hold the rows of an earlier all_reduce.*copy.deepcopy.*reset"
HELD = "other: holds the total of an all_reduce that these moments also hold"
# The messages of each case in order, the same on all ranks.
CASES = {
    "again": [TWICE, TWICE, TWICE],
    "copies_on_the_way": [],
    "node_by_node": [TWICE] * 4,
    "one_rank_of_each_node": [TWICE],
    "going_on_from_a_saved_total": [TWICE],
    "one_that_was_kept": [],
    "merged_moments_remember": [TWICE, HELD],
    "copies_remember_and_reset_forgets": [TWICE] * 4,
    "many_totals": [TWICE, TWICE],
    "rows_that_are_not_finite": [r"mean: .* 2 of 5 columns \(1, 3\)", r"covariance: .* 2 of 5 columns \(1, 3\)"],
    "nothing_to_remember": [TWICE],
    "two_journeys": [],
    "who_is_no_member": [],
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reductions")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, str(RANK), str(folder), str(rank)], env=env, stderr=subprocess.PIPE, text=True
        )
        for rank in range(4)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@pytest.mark.parametrize("case", CASES)
def test_rows_are_counted_once_or_all_ranks_are_refused(case, ranks):
    results = [results[case] for results in ranks]
    assert all(result["right"] for result in results)
    said = [result.get("said", []) for result in results]
    assert all(words == said[0] for words in said)
    assert len(said[0]) == len(CASES[case])
    for words, expected in zip(said[0], CASES[case], strict=True):
        assert re.match(expected, words, re.DOTALL), words
