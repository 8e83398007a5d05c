"""The check whether a matrix is its own transpose."""

import pytest
import torch

from kernels.covariances import covariance
from mir_kernels import _checks


@pytest.mark.parametrize("d", [1, 5, 128, 129, 300])
def test_a_mirrored_matrix_is_told_from_one_with_a_single_entry_off(d):
    a = covariance("i^-1", d, 0)
    assert _checks.mirrored(a)
    assert _checks.mirrored(torch.stack((a, a)))
    if d > 1:
        for i, j in ((0, d - 1), (d - 1, 0), (d - 1, d - 2), (d // 2, d // 2 - 1)):
            off = torch.stack((a, a))
            off[1, i, j] += 1e-9
            assert not _checks.mirrored(off)
