"""What a process holds of a parameter: shards of FSDP, tensor parallel and DeepSpeed, and the shape of the whole."""

from __future__ import annotations

import math
import weakref
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary


class _Flattened(NamedTuple):
    """What FSDP1 knows of a parameter that it has flattened and cut up."""

    shape: torch.Size
    handle: weakref.ReferenceType[Any]
    """Its ``FlatParamHandle``."""
    number: int
    """Of the parameter in that."""


_flattened: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""From parameter to ``_Flattened``. FSDP1 keeps this in its wrappers, where a parameter alone does not lead."""


def remember_flattened(model: nn.Module) -> None:
    """Note what the parameters of a model under FSDP1 were; needed once, from the outermost wrapper or further out."""
    if dist.is_available() and dist.is_initialized():  # FSDP1 asks for that; a large model has many modules
        for module in model.modules():
            remember_flattened_by(module)


def remember_flattened_by(module: nn.Module) -> None:
    """The same, from one module, where that is a wrapper of FSDP1's."""
    handle = getattr(module, "_handle", None) if "_fsdp_wrapped_module" in module._modules else None
    if handle is not None and handle.flat_param._params is not None:
        for number, (parameter, shape) in enumerate(zip(handle.flat_param._params, handle.flat_param._shapes)):
            _flattened[parameter] = _Flattened(shape, weakref.ref(handle), number)


def _flattened_by_fsdp1(tensor: torch.Tensor) -> _Flattened | None:
    if not getattr(tensor, "_fsdp_flattened", False):
        return None
    if tensor not in _flattened:
        raise ValueError(
            "a parameter was flattened by FSDP, and what it was is not known here; call build_decay_groups on the "
            "model with its outermost FSDP wrapper first"
        )
    return cast("_Flattened", _flattened[tensor])


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether nothing marks a tensor as a part of another: FSDP and DeepSpeed do so by attributes of the instance.

    To ask for an attribute that is not there is slow.
    """
    return type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.__dict__


def original_shape(tensor: torch.Tensor) -> torch.Size:
    """The shape of a parameter as the user defined it, also where this process holds a part of it, flattened."""
    if is_plain(tensor):
        return tensor.shape
    if hasattr(tensor, "ds_shape"):  # DeepSpeed ZeRO-3 leaves empty tensors
        return torch.Size(tensor.ds_shape)
    flattened = _flattened_by_fsdp1(tensor)
    return tensor.shape if flattened is None else flattened.shape


def local_part(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """What this process holds of a tensor, and into how many parts the whole is cut among all processes.

    Args:
        tensor: any tensor; a ``DTensor`` (FSDP2, tensor parallel, both) may be replicated over some dimensions of its
            mesh and sharded over others, evenly or not. Also a parameter under FSDP1, or under DeepSpeed ZeRO-3.

    Raises:
        ValueError: for a ``DTensor`` of pending sums (``Partial``), which has no norm before they are added up, and for
            a parameter under FSDP1 of an unknown model.
    """
    if is_plain(tensor):
        return tensor, 1
    if hasattr(tensor, "device_mesh") and hasattr(tensor, "placements"):
        return _local_part_of_dtensor(tensor)
    if hasattr(tensor, "ds_tensor"):
        return _local_part_under_zero3(tensor)
    flattened = _flattened_by_fsdp1(tensor)
    handle = flattened.handle() if flattened is not None else None
    # Between forward and backward, and under summon_full_params, the parameter is there as a whole.
    if handle is None or not handle.uses_sharded_strategy or not handle.is_sharded(handle.flat_param):
        return tensor, 1
    return tensor, handle.process_group.size()


def flat_place(tensor: torch.Tensor) -> tuple[int, int] | None:
    """From which element of a whole parameter to before which this process holds it flattened, None where it does not.

    Raises:
        ValueError: for a parameter under DeepSpeed ZeRO-3, or under FSDP1 of an unknown model.
    """
    if is_plain(tensor) or hasattr(tensor, "device_mesh"):
        return None
    if hasattr(tensor, "ds_tensor"):
        raise ValueError("DeepSpeed ZeRO-3 holds flat parts of parameters, in which no rows or blocks are found")
    flattened = _flattened_by_fsdp1(tensor)
    handle = flattened.handle() if flattened is not None else None
    if flattened is None or handle is None or tensor.shape == flattened.shape:
        return None
    held = handle.flat_param._shard_param_infos[flattened.number]
    return (held.intra_param_start_idx, held.intra_param_end_idx + 1) if held.in_shard else (0, 0)


def _local_part_of_dtensor(tensor: Any) -> tuple[torch.Tensor, int]:
    mesh, placements = tensor.device_mesh, tensor.placements
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"a DTensor placed {placements} holds sums that are still pending: redistribute it first")
    cut = [mesh.size(dim) for dim, placement in enumerate(placements) if not placement.is_replicate()]
    return tensor.to_local(), math.prod(cut)


def _local_part_under_zero3(parameter: Any) -> tuple[torch.Tensor, int]:
    """DeepSpeed cuts a flattened parameter into equal parts, the last of which it fills up with anything."""
    if parameter.ds_status.name == "AVAILABLE":  # gathered, in forward and backward
        return parameter, 1
    part = parameter.ds_tensor
    start = dist.get_rank(parameter.ds_process_group) * part.numel()
    return part[: max(parameter.ds_numel - start, 0)], dist.get_world_size(parameter.ds_process_group)
