"""MIR of a model as it is now, on a probe set, for any training loop; imports no transformers."""

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
    """MIR (Eq. 3) of `model` as it is now, on a probe set; training goes on to the same bits as without it.

    probe: batches as the model takes them (mappings of tensors, moved to the model's device), each row with an image.
    capture, metric: options of `capture` and of `ModalityIntegrationRate`. Samples are dealt into 5 groups for a
    standard error unless `metric` has "groups". Where every batch has "input_ids", which say how many samples there
    are, batches are taken in an order that is random, the same each time, and groups come one after the other: memory
    on a GPU is that without groups. Under torch.distributed every process runs the whole probe;
    metric={"sync_on_compute": True} counts all processes' tokens instead, where each has a part of its own.
    The passes run in eval mode, without gradients, a cache and, where the model can do without, all logits but the
    last. Afterwards each module's own train mode, the random states of Python, numpy and torch, and on CUDA the cached
    memory are as before. Enter autocast outside. Warns where the image is the first thing in a row, unless `metric` has
    sinks="leave out". There is no standard error, and a note says why, where samples of several groups have an image or
    a text in common: an error from their differences would not have what the choice of that one does. Raises TypeError
    or ValueError for a probe that is none, and what `capture` and the metric raise.
    """
    check_probe(probe)
    options = {"groups": 5, "sync_on_compute": False, **(metric or {})}
    probe, notes = _dealt(probe, options)
    measured = ModalityIntegrationRate(**options)
    device, asked, first, rows = parameter_device(model), lean_forward(model), 0, 0
    with undisturbed(model), torch.no_grad(), capturing(model, **(capture or {})) as seen:
        for batch in probe:
            inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            if "labels" in inputs:  # the loss wants every token's logits
                inputs = {name: value for name, value in inputs.items() if name != "labels"}
            model(**{**asked, **inputs})
            measured.update(seen.hidden_states, seen.vision_mask, seen.text_mask)
            first, rows = first + seen.image_first, rows + seen.samples
        if first and measured.options.counts_sinks:
            warnings.warn(f"MIR: {image_first(first, rows)}", stacklevel=2)
        result = measured.compute()
    result.notes.extend(notes)
    measured.reset()  # torchmetrics' objects refer to themselves: the covariances would stay until a garbage collection
    return result


def _dealt(probe: Probe, options: dict[str, Any]) -> tuple[Probe, list[str]]:
    """The probe in the order in which it is measured, and notes; into `options` go "samples", and 0 groups where groups
    would have images or texts in common, which an error from their differences does not know of.
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
    """TypeError or ValueError unless `probe` is a sequence of one batch or more."""
    if isinstance(probe, str | Mapping) or not isinstance(probe, Sequence):
        raise TypeError(f"probe: takes a list of batches (mappings of tensors), got {type(probe).__name__}")
    if len(probe) == 0:
        raise ValueError("probe: takes at least one batch, got none")
    for index, batch in enumerate(probe):
        if not isinstance(batch, Mapping):
            raise TypeError(f"probe[{index}]: takes a mapping of the model's inputs, got {type(batch).__name__}")


def _rows(batch: Mapping[str, Any]) -> int | None:
    """Samples in a batch, None where its names do not say, or rows are several."""
    tokens = batch.get("input_ids")
    return len(tokens) if isinstance(tokens, Tensor) and tokens.dim() == 2 and not is_packed(batch) else None


def _process(options: Mapping[str, Any]) -> tuple[int, int]:
    """This process, and how many processes' samples are counted together."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not (options["sync_on_compute"] and distributed):
        return 0, 1
    group = options.get("process_group")
    return torch.distributed.get_rank(group), torch.distributed.get_world_size(group)


def lean_forward(model: nn.Module) -> dict[str, Any]:
    """Arguments of `model`'s forward that spare what MIR does not read: the cache, and logits of all tokens.

    The vocabulary's logits are larger than everything else in a forward pass.
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
    """Eval mode inside; afterwards each module's own mode, every random state and the CUDA memory as before."""
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
