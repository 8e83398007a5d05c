"""Finds the language decoder in a vision-language model: its layers, the final norm and the enclosing modules."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from modality_integration.models.placement import is_deepspeed_engine, whole_size

Layers = str | Sequence[nn.Module] | None
# Return value of a decoder layer: hidden states (B, T, d), or a tuple that begins with them.
LayerOutput = Tensor | tuple[Any, ...]

# Names of the final norm; used only if the decoder holds several norms.
FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f", "norm_f", "ln_final")

# Substrings in the names of modules that attend from text to image: Llama 3.2 Vision, BLIP.
CROSS_ATTENTION = ("cross_attn", "crossattention")

# Configuration names of the number of residual streams per token: Gemma 3n; DeepSeek-V4, GLM-5, Hunyuan V4; Qwen4.
STREAMS = ("altup_num_inputs", "hc_mult", "hc_count")


@dataclass(frozen=True)
class Decoder:
    """The decoder layers in order, their qualified names, the final norm (None if there is none) and, outermost first,
    the modules from the given model down to the holder of the layers."""

    layers: list[nn.Module]
    names: list[str]
    norm: nn.Module | None
    norm_name: str | None
    path: list[nn.Module]


def find_decoder(model: nn.Module, layers: Layers = None) -> Decoder:
    """The decoder of `model`, found by structure or given by `layers`.

    `layers` is the qualified name of the module list ("model.layers") or the layers themselves, which must be part of
    `model`. Looks inside DDP, FSDP, PEFT and DeepSpeed wrappers. Errors: ValueError if no single list of decoder
    layers is found (the message lists the candidates), and for models on which MIR and MoCa are not defined: those
    that read the image through cross-attention, and encoder-decoder language models.
    """
    _refuse_compiled(model)
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "model: nn.DataParallel runs replicas in threads; use DistributedDataParallel or pass model.module"
        )
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    if layers is None:
        holder = _holder(unwrap(model))
        _refuse_cross_attention(unwrap(model), holder)
        found = _layer_list(holder, model)
        holder = _holder_of(holder, found)
    else:
        found = _given_layers(model, layers)
        holder = _holder_of(model, found)
    missing = [i for i, layer in enumerate(found) if id(layer) not in names]
    if missing:
        raise ValueError(f"layers: expected modules inside model, but entries {missing} are not")
    norm = _final_norm(holder)
    return Decoder(
        layers=found,
        names=[names[id(layer)] for layer in found],
        norm=norm,
        norm_name=None if norm is None else names[id(norm)],
        path=_path(model, names[id(holder)]),
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, FSDP and PEFT wrappers, and inside DeepSpeed's engine."""
    inner: Any = model
    while True:
        wrapped = isinstance(inner, nn.parallel.DistributedDataParallel) or is_deepspeed_engine(inner)
        if wrapped or hasattr(inner, "_fsdp_wrapped_module"):
            inner = inner.module
        elif hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            return inner


def text_config(model: nn.Module) -> object:
    """The configuration of the model's language model; None if there is none."""
    config: object = getattr(unwrap(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def hidden_size(model: nn.Module, decoder: Decoder) -> int:
    """d of the hidden states (B, T, d), from the configuration or the final norm; ValueError if neither states it."""
    weight = getattr(decoder.norm, "weight", None)
    size = getattr(text_config(model), "hidden_size", None) or (whole_size(weight) if weight is not None else None)
    if size is None:
        raise ValueError("model: neither its configuration nor a final norm states the hidden size")
    return int(size)


def refuse_several_streams(model: nn.Module) -> None:
    """Raises ValueError for a language model with several residual streams per token (AltUp, hyper-connections).

    Eq. 1 and Eq. 5 of the MIR paper assume one d-vector per token as a layer's output. These layers pass on n of them,
    remixed in each layer, and the model finally reads a learned mixture, so no single one is the layer's output.
    """
    config = text_config(model)
    for name in STREAMS:
        count = getattr(config, name, None)
        if isinstance(count, int) and count > 1:
            raise ValueError(
                f"model: {type(unwrap(model)).__name__} keeps {count} residual streams per token ({name} of its text "
                "configuration) and remixes them in every layer, so no layer has the single output per token that MIR "
                "and MoCa need"
            )


def _refuse_compiled(model: nn.Module) -> None:
    """Raises ValueError if `model` or a part of it is already compiled: compiled code ignores hooks added later."""
    for name, module in model.named_modules():
        # torch.compile(module) wraps in an OptimizedModule, which holds `_orig_mod`; module.compile() leaves the other
        # mark. Checked by attribute, because importing the class loads the whole compiler.
        if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"model: {name or 'it'} is already compiled, and compiled code does not see hooks added later; "
                "pass the model as it was before torch.compile (the one in `_orig_mod`)"
            )


def _holder(model: Any) -> nn.Module:
    """The module that holds the decoder layers, found by calling transformers' `get_decoder` repeatedly."""
    while hasattr(model, "get_decoder"):
        inner = model.get_decoder()
        if inner is None or inner is model:
            break
        model = inner
    return model


def _layer_list(holder: nn.Module, model: nn.Module) -> list[nn.Module]:
    lists = [child for child in holder.children() if isinstance(child, nn.ModuleList) and len(child)]
    depth = getattr(getattr(holder, "config", None), "num_hidden_layers", None)
    if len(lists) > 1:
        lists = [child for child in lists if len(child) == depth]
    if not lists:  # get_decoder stopped short of them (Llama 4, Kosmos-2) or does not exist: use the only list
        known = getattr(text_config(unwrap(model)), "num_hidden_layers", None)
        lists = [found for found in _outermost_lists(holder) if known in (None, len(found))]
    if len(lists) != 1:
        seen = [f"{n} ({len(m)})" for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
        raise ValueError(
            f"layers: no single list of decoder layers in {type(unwrap(model)).__name__}; pass the name of one of: "
            f"{', '.join(seen) or 'no module list found'}"
        )
    return list(lists[0])


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    """The module lists below `module` that are not nested in another list: a layer's experts are not layers."""
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child):
            yield child
        else:
            yield from _outermost_lists(child)


def _given_layers(model: nn.Module, layers: str | Sequence[nn.Module]) -> list[nn.Module]:
    if isinstance(layers, str):
        for root in (model, unwrap(model)):
            try:
                named = root.get_submodule(layers)
            except AttributeError:
                continue
            found = list(named) if isinstance(named, nn.ModuleList | nn.Sequential) else []
            break
        else:
            raise ValueError(f"layers: no module {layers!r} in {type(unwrap(model)).__name__}")
    else:
        found = list(layers)
    if not found or not all(isinstance(layer, nn.Module) for layer in found):
        raise ValueError("layers: expected a non-empty list of decoder layers, or the qualified name of one")
    return found


def _holder_of(model: nn.Module, layers: list[nn.Module]) -> nn.Module:
    """The module with a child list that starts with the first of `layers`; `model` if no list does."""
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList | nn.Sequential) and len(child) and child[0] is layers[0]:
                return module
    return model


def _final_norm(holder: nn.Module) -> nn.Module | None:
    norms = {name: child for name, child in holder.named_children() if "norm" in type(child).__name__.lower()}
    if len(norms) > 1:
        norms = {name: child for name, child in norms.items() if name in FINAL_NORMS}
    return next(iter(norms.values())) if len(norms) == 1 else None


def _path(model: nn.Module, name: str) -> list[nn.Module]:
    path = [model]
    for part in filter(None, name.split(".")):
        path.append(getattr(path[-1], part))
    return [m for m in path if not isinstance(m, nn.ModuleList | nn.ModuleDict | nn.Sequential)]


def _refuse_cross_attention(model: nn.Module, holder: nn.Module) -> None:
    configs = [config for part in (model, holder) for config in (text_config(part), getattr(part, "config", None))]
    # A decoder with a separate output sequence (DiffusionGemma) is recognised by its arguments.
    writes = holder is not model and "decoder_input_ids" in inspect.signature(holder.forward).parameters
    if writes or any(getattr(config, "is_encoder_decoder", False) for config in configs):
        raise ValueError(
            f"model: {type(model).__name__} has an encoder-decoder language model: its vision tokens end in the "
            "encoder and its text in the decoder, so no layer holds both; to use one stack anyway, pass it as `layers`"
        )
    for name, module in holder.named_modules():
        if any(part in name for part in CROSS_ATTENTION) or "CrossAttention" in type(module).__name__:
            raise ValueError(
                f"model: {type(model).__name__} reads the image through cross-attention ({name}), so there are no "
                "vision tokens in its residual stream to compare with text tokens"
            )
