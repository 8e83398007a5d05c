"""Reads and writes whole parameters, wherever a trainer has put them.

They may be sharded: DTensor (FSDP2), flat parameters (FSDP1), or DeepSpeed's ZeRO 1 to 3, whose optimizers hold float32
copies. Or offloaded: on the meta device, with values that accelerate's hooks fetch. Trainers are recognised by the
attributes they leave on modules and parameters, and imported only if they are in use.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor

ENGINE = "a DeepSpeed engine"
ON_META = (
    "is on the meta device, without values, and no accelerate hook fetches them; load the weights first, or pass the "
    "model that has the hooks"
)

Chain = list[tuple[str, nn.Module]]  # from the model ("") down to a module, each with its name in its parent


def read_whole(model: nn.Module, modules: Sequence[nn.Module]) -> list[dict[str, Tensor]]:
    """The direct parameters of each of `modules`, which are parts of `model`: whole, in CPU memory.

    If DeepSpeed's optimizer has a float32 copy that rounds to the parameter, returns that copy. Shards are gathered one
    module at a time, so every process must call this, with modules in the same order. ValueError for parameters on the
    meta device whose values no hook fetches.
    """
    return _read(_chains(model, modules), _unlinked_copies(model))


def _read(chains: Sequence[Chain], unlinked: Mapping[int, Tensor]) -> list[dict[str, Tensor]]:
    found = []
    for chain in chains:
        with _unsharded(chain) as parameters:
            values = {name: _value(chain, name, parameter) for name, parameter in parameters.items()}
        for name, copy in _optimizer_copies(chain, unlinked).items():
            if torch.equal(copy.to(values[name].dtype), values[name]):
                values[name] = copy
        found.append(values)
    return found


def write_whole(model: nn.Module, modules: Sequence[nn.Module], values: Sequence[Mapping[str, Tensor]]) -> list[int]:
    """Writes `values` (for each module, by parameter name) into `modules`; every process must pass the same values.

    Reads everything back and returns the indices of those `modules` that do not hold what was written.
    """
    chains, unlinked = _chains(model, modules), _unlinked_copies(model)
    with torch.no_grad():
        for chain, given in zip(chains, values, strict=True):
            with _unsharded(chain, writing=True) as parameters:
                for name, parameter in parameters.items():
                    _set_value(chain, name, parameter, given[name])
            for name, parameter in _own(chain).items():
                _set_optimizer_copy(parameter, given.get(name), unlinked)
    failed = []
    for i, (chain, now) in enumerate(zip(chains, _read(chains, unlinked), strict=True)):
        held = [*now.items(), *_optimizer_copies(chain, unlinked).items()]
        if not all(torch.equal(value, values[i][name].to("cpu", value.dtype)) for name, value in held):
            failed.append(i)
    return failed


def why_not_writable(model: nn.Module, modules: Sequence[nn.Module]) -> str | None:
    """Why `write_whole` would fail; None if it would not."""
    for chain in _chains(model, modules):
        for name, parameter in _own(chain).items():
            if parameter.device.type == "meta":
                try:
                    _stored(chain, name)
                except ValueError as error:
                    return str(error)
    return None


def in_parts(model: nn.Module, modules: Sequence[nn.Module]) -> bool:
    """Whether these modules' parameters are sharded over processes, so that reading them is a collective operation."""
    if not is_distributed():
        return False
    for chain in _chains(model, modules):
        if any(isinstance(module, FullyShardedDataParallel | FSDPModule) for _, module in chain):
            return True
        if any(gathered_by_all(p) or hasattr(p, "_hp_mapping") for p in _own(chain).values()):
            return True
    return False


def gathered_by_all(parameter: Tensor) -> bool:
    """Whether gathering this parameter is a collective operation: a DTensor, or a parameter of ZeRO-3."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def is_distributed() -> bool:
    """Whether this is one of several processes."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed and torch.distributed.get_world_size() > 1


def is_first_process() -> bool:
    """Whether this is rank 0, which writes and reports for all processes, or the only process."""
    return not is_distributed() or torch.distributed.get_rank() == 0


def is_deepspeed_engine(module: object) -> bool:
    """Whether `module` is a DeepSpeed engine, for training or inference."""
    kinds = type(module).__mro__
    return any(kind.__module__.startswith("deepspeed.") and kind.__name__.endswith("Engine") for kind in kinds)


def deepspeed_engine(model: nn.Module) -> nn.Module | None:
    """The DeepSpeed engine that `model` is, contains or is part of; None if there is none."""
    for module in model.modules():
        if is_deepspeed_engine(module):
            return module
        for hook in module._forward_pre_hooks.values():
            if getattr(hook, "__module__", "").startswith("deepspeed."):
                for cell in getattr(hook, "__closure__", None) or ():
                    if is_deepspeed_engine(cell.cell_contents):
                        return cell.cell_contents
    return _engine_around(model)


def _engine_around(model: nn.Module) -> nn.Module | None:
    """The DeepSpeed engine that contains `model`; `model` has no reference to it, so this searches all objects."""
    if "deepspeed" not in sys.modules:
        return None
    for found in gc.get_objects():
        if not issubclass(type(found), nn.Module) or not is_deepspeed_engine(found):
            continue
        if any(module is model for module in found.modules()):
            return found
    return None


def sharder_of(model: nn.Module) -> str | None:
    """The wrapper that has already registered the parameters of `model` for training and would miss new ones."""
    for module in model.modules():
        wrapped = isinstance(module, FSDPModule | nn.parallel.DistributedDataParallel)
        if wrapped or hasattr(module, "_fsdp_wrapped_module"):
            return type(module).__name__
    if deepspeed_engine(model) is not None:
        return ENGINE
    for parameter in model.parameters():
        # zero.Init gives a parameter its ds_id, deepspeed.initialize links it to the optimizer.
        if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer"):
            return ENGINE
        if hasattr(parameter, "_fsdp_flattened"):
            return "FullyShardedDataParallel"
    return None


def may_be_trained_in_float32(model: nn.Module, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether the 16-bit `parameters` may be copies of trained float32 ones: gathered by FSDP, or an optimizer's."""
    if any(isinstance(p, DTensor) for p in parameters):
        return False  # FSDP2's trained parameters: gathered copies are not DTensors
    if any(p.untyped_storage().nbytes() > p.nbytes for p in parameters):
        return True  # a slice of a flat tensor, as FSDP1 gathers it
    return sharder_of(model) not in (None, nn.parallel.DistributedDataParallel.__name__)


def whole_size(parameter: Tensor) -> int:
    """The last dimension of a parameter, even if ZeRO-3 has left it empty."""
    return int(tuple(getattr(parameter, "ds_shape", parameter.shape))[-1])


def accelerate_hooks(module: nn.Module) -> list[Any]:
    """The accelerate hooks on `module` itself."""
    hook = module.__dict__.get("_hf_hook")
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))


def parameter_device(module: nn.Module) -> torch.device:
    """The device on which `module` computes: the first execution device of an accelerate hook, else that of its first
    parameter with values. ValueError if all its parameters are on the meta device."""
    empty = None
    for name, part in module.named_modules():
        for hook in accelerate_hooks(part):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
        for own, parameter in part.named_parameters(recurse=False):
            if parameter.device.type != "meta":
                return parameter.device
            empty = empty or f"{name}.{own}".lstrip(".")
    if empty is not None:
        raise ValueError(f"model: {empty} {ON_META}")
    return torch.device("cpu")


def _chains(model: nn.Module, modules: Sequence[nn.Module]) -> list[Chain]:
    """The path from `model` to each of `modules`."""
    names = {id(module): name for name, module in model.named_modules()}
    chains = []
    for module in modules:
        chain: Chain = [("", model)]
        for part in filter(None, names[id(module)].split(".")):
            inside = chain[-1][1]._modules[part]
            assert inside is not None  # named_modules listed it
            chain.append((part, inside))
        chains.append(chain)
    return chains


def _own(chain: Chain) -> dict[str, nn.Parameter]:
    return dict(chain[-1][1].named_parameters(recurse=False))


def _full_name(chain: Chain, name: str) -> str:
    return ".".join([part for part, _ in chain[1:]] + [name])


@contextmanager
def _unsharded(chain: Chain, *, writing: bool = False) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters of the chain's last module, gathered by FSDP1 and ZeRO-3 inside the block."""
    with ExitStack() as stack:
        wrappers = [module for _, module in chain if isinstance(module, FullyShardedDataParallel)]
        if wrappers:
            summon = FullyShardedDataParallel.summon_full_params
            if getattr(wrappers[0], "_is_root", None) is None:  # before the first forward: or a part would become root
                if wrappers[0] is not chain[0][1]:
                    stack.callback(_forget_the_root, wrappers[0])  # a wrapper around `model` may be the real root
                with summon(wrappers[0], recurse=False, writeback=False):
                    pass
            stack.enter_context(summon(wrappers[-1], recurse=False, writeback=writing))
        groups = [module for _, module in chain if isinstance(module, FSDPModule)]
        if groups:
            groups[-1].reshard()  # a forward may have left unsharded copies in place of the parameters
        parameters = list(_own(chain).values())
        if any(hasattr(parameter, "ds_id") for parameter in parameters):
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if writing else None))
        yield _own(chain)


def _forget_the_root(wrapper: FullyShardedDataParallel) -> None:
    """Lets the next forward choose FSDP1's root again, as FSDP1 itself does after gathering before the first one."""
    for module in FullyShardedDataParallel.fsdp_modules(wrapper):
        module._is_root = None


def _value(chain: Chain, name: str, parameter: nn.Parameter) -> Tensor:
    value = parameter.detach()
    if value.device.type == "meta":
        stored, key = _offloaded(chain, name)
        value = stored[key].detach()
    elif isinstance(value, DTensor):
        mesh = value.device_mesh.device_type
        parts: Any = value if value.device.type == mesh else value.to(mesh)  # CPU offloading: gather on the mesh
        value = parts.full_tensor()
    return value.to("cpu", copy=True).contiguous()


def _set_value(chain: Chain, name: str, parameter: nn.Parameter, value: Tensor) -> None:
    if parameter.device.type == "meta":
        stored, key = _stored(chain, name)
        if isinstance(stored, Path):
            from accelerate.utils import offload_weight

            offload_weight(value.to(_value(chain, name, parameter).dtype), key, stored)
        else:
            stored[key].copy_(value)
    elif isinstance(parameter, DTensor):
        whole = value.to(parameter.dtype)
        spread = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        parameter.to_local().copy_(spread.to_local())
    else:
        parameter.copy_(value)


def _offloaded(chain: Chain, name: str) -> tuple[Mapping[str, Tensor], str]:
    """The mapping and key from which an accelerate hook, on the module or its parents, fetches the parameter."""
    for depth in range(len(chain), 0, -1):
        key = ".".join([part for part, _ in chain[depth:]] + [name])
        for hook in accelerate_hooks(chain[depth - 1][1]):
            weights = getattr(hook, "weights_map", None)
            if getattr(hook, "offload", False) and weights is not None and key in weights:
                return weights, key
    raise ValueError(f"model: {_full_name(chain, name)} {ON_META}")


def _stored(chain: Chain, name: str) -> tuple[MutableMapping[str, Tensor] | Path, str]:
    """The place from which the hook fetches the parameter and its key: tensors by name, or accelerate's folder."""
    weights: Any
    weights, key = _offloaded(chain, name)
    while hasattr(weights, "dataset") and hasattr(weights, "prefix"):
        weights, key = weights.dataset, f"{weights.prefix}{key}"
    if isinstance(weights, dict):
        return weights, key
    if key in getattr(weights, "state_dict", ()):
        return weights.state_dict, key
    entry = getattr(weights, "index", {}).get(key)
    if entry is None or entry.get("safetensors_file") is not None:
        where = type(weights).__name__ if entry is None else entry["safetensors_file"]
        raise ValueError(
            f"model: {_full_name(chain, name)} is offloaded and fetched from {where}, which load_moca does not modify; "
            "load MoCa before offloading the model, or keep modality_layernorm on a device in the device_map"
        )
    return Path(weights.save_folder), key


def _unlinked_copies(model: nn.Module) -> dict[int, Tensor]:
    """The float32 copies held by DeepSpeed's optimizers without ZeRO, by the id of the parameter. These optimizers
    keep the copies in the same groups as the parameters, one by one or flat, without a link between the two."""
    optimizer: Any = getattr(deepspeed_engine(model), "optimizer", None)
    found: dict[int, Tensor] = {}
    for i, group in enumerate(getattr(optimizer, "fp16_groups", ())):
        if hasattr(optimizer, "fp32_groups"):
            found.update(zip(map(id, group), optimizer.fp32_groups[i], strict=True))
        elif hasattr(optimizer, "fp32_groups_flat"):
            pieces = optimizer.fp32_groups_flat[i].detach().split([parameter.numel() for parameter in group])
            found.update(
                (id(parameter), piece.view_as(parameter)) for parameter, piece in zip(group, pieces, strict=True)
            )
    return found


def _optimizer_copies(chain: Chain, unlinked: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """The whole float32 copies of the last module's parameters in DeepSpeed's optimizer."""
    found = {}
    for name, parameter in _own(chain).items():
        if id(parameter) in unlinked:
            found[name] = unlinked[id(parameter)].detach().to("cpu", copy=True)
        elif _linked(parameter):
            from deepspeed.utils import safe_get_full_fp32_param

            copy = safe_get_full_fp32_param(parameter)
            if copy is not None:
                found[name] = copy.detach().to("cpu", copy=True)
    return found


def _set_optimizer_copy(parameter: Any, value: Tensor | None, unlinked: Mapping[int, Tensor]) -> None:
    if value is not None and id(parameter) in unlinked:
        unlinked[id(parameter)].copy_(value)
        return
    if value is None or not _linked(parameter):
        return
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    value = value.to(parameter.device, torch.float32)
    if not hasattr(parameter, "ds_id"):
        safe_set_full_fp32_param(parameter, value)
        return
    # Not safe_set_full_fp32_param: it fails if the last process's shard is padded.
    group, size = parameter.ds_process_group, parameter.ds_tensor.numel()
    padded = value.new_zeros(size * torch.distributed.get_world_size(group))
    padded[: value.numel()] = value
    safe_set_local_fp32_param(parameter, padded.narrow(0, size * torch.distributed.get_rank(group), size))


def _linked(parameter: Any) -> bool:
    """Whether DeepSpeed has linked the parameter to a copy in its optimizer."""
    if hasattr(parameter, "ds_id"):
        return hasattr(parameter, "_z3_optimizer") and parameter.requires_grad
    return hasattr(parameter, "_hp_mapping")
