"""Samples through a model, one at a time, into the metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from modality_integration.app.errors import InputError, refusals
from modality_integration.app.options import TokenOptions
from modality_integration.app.prompts import encode, truncate
from modality_integration.app.samples import Sample, open_image
from modality_integration.metric.result import MIRResult
from modality_integration.metric.streaming import ModalityIntegrationRate
from modality_integration.models.capture import capture
from modality_integration.models.placement import parameter_device
from modality_integration.training.measure import lean_forward


def stream(
    model: torch.nn.Module,
    processor: Any,
    samples: Sequence[Sample],
    metric: ModalityIntegrationRate,
    tokens: TokenOptions,
    *,
    start: int = 0,
    after_sample: Callable[[int], None] = lambda count: None,
) -> int:
    """Forward `samples[start:]` one at a time and feed the hidden states of every layer to `metric`.

    `after_sample(count)` is called with the number of samples counted so far; the metric then holds exactly those.
    Gives how many of the samples forwarded begin with the image.
    """
    image_first = 0
    device, dtype, forward = parameter_device(model), next(model.parameters()).dtype, lean_forward(model)
    name = "the first sample"
    try:
        seeing = capture(model, last=tokens.last, text=tokens.text_role)
        with torch.inference_mode(), refusals("model"), seeing as captured:
            for index in range(start, len(samples)):
                sample = samples[index]
                name = f"sample {index + 1} of {len(samples)} ({sample.name})"
                prose = truncate(sample.text.content, processor.tokenizer, tokens.prose_tokens)
                with refusals(name):
                    inputs = encode(processor, open_image(sample.image), prose, tokens.prompt)
                model(**{k: _place(v, device, dtype) for k, v in inputs.items()}, **forward)
                with refusals(name):
                    metric.update(captured.hidden_states, captured.vision_mask, captured.text_mask)
                image_first += captured.image_first
                after_sample(index + 1)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(device, name, tokens.prose_tokens) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error) or "not enough memory" in str(error):  # torch's CPU allocator
            raise _out_of_memory(device, name, tokens.prose_tokens) from error
        raise
    return image_first


def finish(metric: ModalityIntegrationRate) -> MIRResult:
    """The metric's result, what cannot be computed said as an InputError."""
    with refusals("MIR is not defined for these samples"):
        result = metric.compute()
    asked, got = metric.options.groups, len(result.left_out[0]) if result.left_out else 0
    if 0 < got < asked:
        result.notes.append(
            f"the standard error is of {got} groups of samples, {asked} were asked for: take more samples"
        )
    return result


def _place(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)


def _out_of_memory(device: torch.device, name: str, text_tokens: int | None) -> InputError:
    return InputError(
        f"out of memory on {device} at {name}: lower --text-tokens (now {text_tokens or 'all'}) or --groups, load the "
        "weights smaller with --dtype bfloat16, or use --device cpu; with changed arguments add --restart"
    )
