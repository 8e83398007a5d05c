"""The packed lower triangle compared with plain matrices."""

import pytest
import torch

from mir_kernels.ops.moments import packed


@pytest.mark.parametrize("d", [1, 3, 255, 256, 257, 600])
def test_packed_triangle_gives_back_a_symmetric_matrix(d):
    vectors = torch.randn(3, d, dtype=torch.float64)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    flat = torch.zeros(packed.entries(d), dtype=torch.float64)
    packed.add_outer(flat, d, vectors, weights)
    expected = vectors.T @ (vectors * weights[:, None])
    full = packed.unpack(flat, d)
    torch.testing.assert_close(full, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(full, full.T)
    assert torch.equal(packed.diagonal(flat, d), full.diagonal())
    assert packed.entries(d) <= d * (d + 1) // 2 + d * packed.PANEL // 2
