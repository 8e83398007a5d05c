"""Run samples through a model, a few at a time, and feed the metric."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from modality_integration.app.batches import CannotBatch, collated
from modality_integration.app.errors import InputError, refusals
from modality_integration.app.options import TokenOptions
from modality_integration.app.prompts import encode, truncate
from modality_integration.app.samples import Sample, open_image
from modality_integration.metric.result import MIRResult
from modality_integration.metric.streaming import ModalityIntegrationRate
from modality_integration.models.capture import Capture, capture
from modality_integration.models.placement import parameter_device
from modality_integration.training.measure import lean_forward

logger = logging.getLogger(__name__)

MOST_APART = 0.25  # largest relative difference between a sample's states in a batch and alone


def stream(
    model: torch.nn.Module,
    processor: Any,
    samples: Sequence[Sample],
    metric: ModalityIntegrationRate,
    tokens: TokenOptions,
    *,
    start: int = 0,
    batch_size: int = 1,
    after_sample: Callable[[int], None] = lambda count: None,
) -> int:
    """Forward `samples[start:]`, `batch_size` at a time, and feed the hidden states of every layer to `metric`.

    `after_sample(count)` is called after each forward pass with the number of samples counted so far; the metric then
    holds exactly those. Samples of one pass are padded on the right, and padding is not counted.
    Returns how many of the forwarded samples begin with the image.
    """
    image_first = 0
    device, dtype, forward = parameter_device(model), next(model.parameters()).dtype, lean_forward(model)
    name = "the first sample"

    def inputs_of(sample: Sample) -> dict[str, Any]:
        prose = truncate(sample.text.content, processor.tokenizer, tokens.prose_tokens)
        return encode(processor, open_image(sample.image), prose, tokens.prompt)

    def forwarded(inputs: dict[str, Any]) -> None:
        model(**{k: _place(v, device, dtype) for k, v in inputs.items()}, **forward)

    try:
        seeing = capture(model, last=tokens.last, text=tokens.text_role)
        with torch.inference_mode(), refusals("model"), seeing as captured:
            for index in range(start, len(samples), batch_size):
                batch = samples[index : index + batch_size]
                name = _name(batch, index, len(samples))
                with refusals(name):
                    each = [inputs_of(sample) for sample in batch]
                _pass(each, processor, forwarded, captured)
                with refusals(name):
                    metric.update(captured.hidden_states, captured.vision_mask, captured.text_mask)
                image_first += captured.image_first
                if index == start and len(each) > 1:
                    _require_apart(each, forwarded, captured)
                logger.debug("forwarded %s", name)
                after_sample(index + len(each))
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(device, name, tokens.prose_tokens, batch_size) from error
    except RuntimeError as error:
        if _is_out_of_memory(error):
            raise _out_of_memory(device, name, tokens.prose_tokens, batch_size) from error
        raise
    return image_first


def finish(metric: ModalityIntegrationRate) -> MIRResult:
    """The metric's result; InputError if it cannot be computed."""
    began = time.monotonic()
    with refusals("MIR is not defined for these samples"):
        result = metric.compute()
    logger.info("distances of %d layers in %.1f s", len(result.terms), time.monotonic() - began)
    asked, got = metric.options.groups, result.groups
    if 0 < got < asked:
        result.notes.append(
            f"the standard error uses {got} groups of samples instead of the requested {asked}; use more samples"
        )
    return result


def _pass(
    each: Sequence[dict[str, Any]], processor: Any, forward: Callable[[dict[str, Any]], None], captured: Capture
) -> None:
    """One forward pass of all samples. InputError if they fail together although each works alone."""
    if len(each) == 1:
        return forward(each[0])
    try:
        forward(collated(each, processor.tokenizer))
        rows = len(captured.vision_mask)
        if rows != len(each):
            raise CannotBatch(f"the model returned {rows} rows for {len(each)} samples")
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a model without batch support may raise anything
        if isinstance(error, RuntimeError) and _is_out_of_memory(error):
            raise
        if not isinstance(error, CannotBatch):
            for inputs in each:  # an error of a single sample is raised here
                forward(inputs)
                _ = captured.text_mask
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _one_at_a_time(len(each), reason) from error


def _require_apart(
    each: Sequence[dict[str, Any]], forward: Callable[[dict[str, Any]], None], captured: Capture
) -> None:
    """InputError unless the sample with the most padding has about the same states in the batch as alone.

    A model or its inputs may mix up samples without an error. Rounding stays below the tolerance in any dtype.
    """
    shortest = min(range(len(each)), key=lambda row: each[row]["input_ids"].shape[1])
    together = captured.hidden_states[-1][shortest].float()
    forward(each[shortest])
    alone = captured.hidden_states[-1][0].float()
    apart = float((together[: len(alone)] - alone).norm() / alone.norm())
    if not apart < MOST_APART:
        raise _one_at_a_time(
            len(each), f"a sample's hidden states in the batch differ by {apart:.0%} from those of the sample alone"
        )


def _one_at_a_time(count: int, reason: str) -> InputError:
    return InputError(
        f"batch-size: this model and processor do not support {count} samples per forward pass ({reason}); use "
        "--batch-size 1"
    )


def _name(batch: Sequence[Sample], index: int, total: int) -> str:
    if len(batch) == 1:
        return f"sample {index + 1} of {total} ({batch[0].name})"
    return f"samples {index + 1} to {index + len(batch)} of {total} (the first is {batch[0].name})"


def _place(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether this is an out-of-memory error of torch's CPU allocator."""
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)


def _out_of_memory(device: torch.device, name: str, text_tokens: int | None, batch_size: int) -> InputError:
    fewer = f"--batch-size (now {batch_size}), " if batch_size > 1 else ""
    return InputError(
        f"out of memory on {device} at {name}; lower {fewer}--text-tokens (now {text_tokens or 'all'}) or --groups, "
        "load smaller weights with --dtype bfloat16, or use --device cpu; with changed arguments, add --restart"
    )
