"""MIR of a model in its current state, on a probe set, for any training loop; does not import transformers."""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modality_integration.metric.result import MIRResult
from modality_integration.metric.sink_notes import image_first
from modality_integration.metric.streaming import ModalityIntegrationRate
from modality_integration.models.capture import capture as capturing
from modality_integration.models.decoder import unwrap
from modality_integration.models.placement import parameter_device
from modality_integration.models.token_roles import is_packed
from modality_integration.training import repeats

Probe = Sequence[Mapping[str, Any]]


def measure_mir(
    model: nn.Module,
    probe: Probe,
    *,
    capture: Mapping[str, Any] | None = None,
    metric: Mapping[str, Any] | None = None,
) -> MIRResult:
    """MIR (Eq. 3) of `model` in its current state, on a probe set; training continues bit for bit as without it.

    probe: batches of model inputs (mappings of tensors, moved to the model's device), each row with an image.
    capture, metric: options of `capture` and of `ModalityIntegrationRate`. Samples are divided into 5 groups for a
    standard error unless `metric` has "groups". If every batch has "input_ids", which show the number of samples,
    batches run in a fixed random order and groups are consecutive blocks, so that GPU memory is the same as without
    groups. Under torch.distributed every process runs the whole probe; if each process has a separate part of it,
    metric={"sync_on_compute": True} counts the tokens of all processes.
    The passes run in eval mode, without gradients and without a cache and, if the model supports it, with only the last
    token's logits. Afterwards, each module's train mode, the random states of Python, numpy and torch, and the cached
    CUDA memory are restored. Enter autocast outside. Warns if rows begin with an image, unless `metric` has
    sinks="leave out". If samples of several groups share an image or a text, there is no standard error and a note says
    why: the groups would not be independent, and the error would miss the variance due to the shared one. Raises
    TypeError or ValueError for an invalid probe, and the errors of `capture` and the metric.
    """
    check_probe(probe)
    options = {"groups": 5, "sync_on_compute": False, **(metric or {})}
    probe, notes = _dealt(probe, options)
    measured = ModalityIntegrationRate(**options)
    device, asked, first, rows = parameter_device(model), lean_forward(model), 0, 0
    with undisturbed(model), torch.no_grad(), capturing(model, **(capture or {})) as seen:
        for batch in probe:
            inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            if "labels" in inputs:  # the loss needs every token's logits
                inputs = {name: value for name, value in inputs.items() if name != "labels"}
            model(**{**asked, **inputs})
            measured.update(seen.hidden_states, seen.vision_mask, seen.text_mask)
            first, rows = first + seen.image_first, rows + seen.samples
        if first and measured.options.counts_sinks:
            warnings.warn(f"MIR: {image_first(first, rows)}", stacklevel=2)
        result = measured.compute()
    result.notes.extend(notes)
    measured.reset()  # frees the covariances: torchmetrics' objects refer to themselves and await garbage collection
    return result


def _dealt(probe: Probe, options: dict[str, Any]) -> tuple[Probe, list[str]]:
    """The probe in the order of measurement, and notes. Sets `options["samples"]`, and `options["groups"]` to 0 if
    groups would share images or texts and so would not be independent.
    """
    counts = [_rows(batch) for batch in probe]
    rows = [count for count in counts if count is not None]
    if len(rows) < len(counts):
        return probe, []
    groups, (process, processes) = options["groups"], _process(options)
    in_blocks, order = "samples" not in options, list(range(len(probe)))
    if in_blocks:
        options["samples"] = sum(rows) * processes
        order = repeats.shuffled(len(probe))
    if groups > 1:
        shown = [repeats.contents(batch, count) for batch, count in zip(probe, rows, strict=True)]
        if in_blocks:
            order = repeats.order_apart(shown, groups, order)
        met = [shown[i] for i in order]
        if found := repeats.shared(met, groups, options["samples"], process, processes):
            options["groups"] = 0
            note = f"no standard error: {found} for {sum(rows)} samples; groups that share one are not independent"
            return [probe[i] for i in order], [note]
    return [probe[i] for i in order], []


def check_probe(probe: Any) -> None:
    """Raises TypeError or ValueError unless `probe` is a sequence of at least one batch."""
    if isinstance(probe, str | Mapping) or not isinstance(probe, Sequence):
        raise TypeError(f"probe: expected a list of batches (mappings of tensors), got {type(probe).__name__}")
    if len(probe) == 0:
        raise ValueError("probe: expected at least one batch, got none")
    for index, batch in enumerate(probe):
        if not isinstance(batch, Mapping):
            raise TypeError(f"probe[{index}]: expected a mapping of the model's inputs, got {type(batch).__name__}")


def _rows(batch: Mapping[str, Any]) -> int | None:
    """The number of samples in a batch; None if it has no 2-D input_ids, or its rows are packed."""
    tokens = batch.get("input_ids")
    return len(tokens) if isinstance(tokens, Tensor) and tokens.dim() == 2 and not is_packed(batch) else None


def _process(options: Mapping[str, Any]) -> tuple[int, int]:
    """The rank of this process, and the number of processes whose samples are counted together."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not (options["sync_on_compute"] and distributed):
        return 0, 1
    group = options.get("process_group")
    return torch.distributed.get_rank(group), torch.distributed.get_world_size(group)


def lean_forward(model: nn.Module) -> dict[str, Any]:
    """Arguments of `model`'s forward that avoid outputs MIR does not need: the cache, and logits of all tokens.

    The logits over the vocabulary are larger than everything else in a forward pass.
    """
    inner = unwrap(model)
    taken = inspect.signature(inner.forward).parameters
    config: Any = getattr(inner, "config", None)
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    asked: dict[str, Any] = {}
    if "use_cache" in taken or (passes_on and hasattr(config, "get_text_config")):
        asked["use_cache"] = False
    if "logits_to_keep" in taken:
        asked["logits_to_keep"] = 1
    return asked


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards restores each module's mode, all random states and the cached CUDA memory."""
    training = [module for module in model.modules() if module.training]
    cuda = torch.cuda.is_initialized()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - trainers use both
    cuda_states = torch.cuda.get_rng_state_all() if cuda else []
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda_states)
            torch.cuda.empty_cache()
