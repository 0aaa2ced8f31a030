"""What the model has: names, shapes and owners of parameters, as the user wrote them.

All knowledge of wrappers (and of shards) is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

_WRAPPED = {
    "_orig_mod",  # torch.compile
    "_checkpoint_wrapped_module",  # activation checkpointing
    "_fsdp_wrapped_module",  # FSDP1
    "_forward_module",  # lightning.fabric, what Fabric.setup returns
    "_original_module",  # the same: it holds the model twice
}
"""The attributes under which wrappers hold the user's module: no part of a parameter's name."""


class Place(NamedTuple):
    """One place of the model that holds a parameter."""

    name: str
    """The full name, wrappers left out."""
    module: nn.Module
    """The module that owns the parameter there."""


@dataclass(frozen=True)
class ModelParameter:
    """A parameter as the user defined it, with every place that holds it: several where it is tied."""

    parameter: nn.Parameter
    places: tuple[Place, ...]
    """In the order of ``named_parameters``; never empty."""

    @property
    def name(self) -> str:
        """The first name, which is the one that ``named_parameters`` reports."""
        return self.places[0].name

    @property
    def names(self) -> list[str]:
        """Every name."""
        return [place.name for place in self.places]

    @property
    def ndim(self) -> int:
        """The number of dimensions as the user defined it."""
        return self.parameter.ndim


def model_parameters(module: nn.Module) -> list[ModelParameter]:
    """All parameters of a model, each once, in the order of ``named_parameters``.

    Args:
        module: any module, on any device (the meta device included), wrapped or not.

    Raises:
        ValueError: for a lazy parameter, which has no shape yet.

    >>> layer = nn.Linear(2, 2)
    >>> [p.names for p in model_parameters(nn.Sequential(layer, nn.ReLU(), layer))]
    [['0.weight', '2.weight'], ['0.bias', '2.bias']]
    """
    places: dict[nn.Parameter, dict[str, Place]] = {}
    for parameter, place in _places(module):
        if is_lazy(parameter):
            raise ValueError(
                f"parameter {place.name!r} of {type(place.module).__name__} has no shape yet (it is lazy); run one "
                "batch through the model before the optimizer is built, for example in configure_model()"
            )
        places.setdefault(parameter, {}).setdefault(place.name, place)
    return [ModelParameter(parameter, tuple(named.values())) for parameter, named in places.items()]


def _places(
    module: nn.Module, path: str = "", above: tuple[nn.Module, ...] = ()
) -> Iterator[tuple[nn.Parameter, Place]]:
    """Every place of every parameter, in the order of ``named_parameters``; a module inside itself is not entered."""
    if isinstance(module, ParametrizationList):
        yield from _originals(module, path, above[-2])
    else:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield parameter, Place(path + name, module)
    wraps = isinstance(module, (DataParallel, DistributedDataParallel))
    for name, child in module._modules.items():
        if child is not None and child is not module and child not in above:
            inside = path if name in _WRAPPED or wraps else f"{path}{name}."
            yield from _places(child, inside, (*above, module))


def _originals(
    parametrizations: ParametrizationList, path: str, owner: nn.Module
) -> Iterator[tuple[nn.Parameter, Place]]:
    """The tensors behind a parametrized weight (weight norm, LoRA, …): they also go by the weight's plain name.

    ``torch.nn.utils.parametrize`` moves ``fc.weight`` to ``fc.parametrizations.weight.original``; the user wrote a
    ``weight`` of ``fc``.
    """
    owner_path, _, tensor_name = path.removesuffix(".").rpartition("parametrizations.")
    for name, parameter in parametrizations._parameters.items():
        if parameter is not None:
            yield parameter, Place(path + name, owner)
            yield parameter, Place(owner_path + tensor_name, owner)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor stands for a larger one, of which this process holds a part."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")
