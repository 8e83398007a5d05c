"""numpy arrays, and masks of 0 and 1, yield the same MIR as the corresponding tensors."""

import numpy as np
import pytest
import torch

from integration.metric.streams import sample
from modality_integration import (
    ModalityIntegrationRate,
    expanded_placeholders,
    mir,
    mir_of_states,
    official,
    save_states,
)

HIDDEN, VISION, TEXT = sample(0)
ARRAYS = [hidden.numpy() for hidden in HIDDEN]


def features(hidden, mask):
    return [layer[mask] for layer in hidden]


def test_mir_of_arrays():
    arrays = [features(ARRAYS, mask.numpy()) for mask in (VISION, TEXT)]
    assert mir(*arrays, bounds=True) == mir(*(features(HIDDEN, mask) for mask in (VISION, TEXT)), bounds=True)
    assert official.calculate_fid(arrays[0][0], arrays[1][0]) == official.calculate_fid(
        *(torch.from_numpy(side[0]) for side in arrays)
    )


@pytest.mark.parametrize("dtype", [bool, np.int64, np.int32, np.uint8])
@pytest.mark.parametrize("forward", [False, True])
def test_a_stream_of_arrays(dtype, forward, tmp_path):
    masks = [mask.numpy().astype(dtype) for mask in (VISION, TEXT)]
    ids = np.zeros(VISION.shape, dtype=np.int64)
    expected, found = ModalityIntegrationRate(), ModalityIntegrationRate()
    expected.update(HIDDEN, VISION, TEXT)
    (found if forward else found.update)(ARRAYS, *masks, ids)
    assert found.compute() == expected.compute()
    save_states(tmp_path / "a.safetensors", ARRAYS, *masks)
    save_states(tmp_path / "b.safetensors", HIDDEN, VISION, TEXT)
    assert mir_of_states([tmp_path / "a.safetensors"]) == mir_of_states([tmp_path / "b.safetensors"])


def test_another_number_in_a_mask_is_refused_and_nothing_changes():
    metric = ModalityIntegrationRate()
    with pytest.raises(ValueError, match="text_mask: expected True and False, or 0 and 1, got 2"):
        metric.update(HIDDEN, VISION, TEXT.long() * 2)
    with pytest.raises(TypeError, match=r"vision_mask: expected one of the dtypes bool, uint8.* got float32"):
        metric.update(HIDDEN, VISION.float(), TEXT)
    assert not metric._layers


def test_placeholders_of_arrays():
    ids, keep = np.array([[1, -200, 5, 0]]), np.array([[1, 1, 1, 0]])
    assert expanded_placeholders(ids, -200, 2, attention_mask=keep).tolist() == [[False, True, True, False]]


def test_what_is_written_in_place_takes_a_tensor():
    with pytest.raises(TypeError, match=r"data: expected a torch.Tensor, got ndarray; data is written in place"):
        official.replace_outliers_with_median_l2(ARRAYS[0][0])
