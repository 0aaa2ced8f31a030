"""What the model has: names, shapes and owners of parameters, as the user wrote them.

All knowledge of wrappers (and of shards) is here.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.weak import WeakTensorKeyDictionary

_WRAPPERS = (
    {"_orig_mod"},  # torch.compile
    {"_checkpoint_wrapped_module"},  # activation checkpointing
    {"_fsdp_wrapped_module"},  # FSDP1
    {"_forward_module"},  # lightning.fabric, what Fabric.setup returns
    {"_forward_module", "_original_module"},  # the same, which holds the model twice
)
"""The attributes under which wrappers hold the user's module, and nothing else: no part of a parameter's name."""
_WRAPPED = set().union(*_WRAPPERS)
_MOST_OTHER_PATHS = 50_000
"""Modules that are gone through again to find other names of what is shared. A graph of shared modules has more paths
than could be listed."""

_LISTS = frozenset({"no_weight_decay", "no_weight_decay_keywords"})
"""The methods by which vision models list what is not to decay: names of parameters, or globs; parts of names."""

_Lister: TypeAlias = tuple[nn.Module, str]


class ModelParameter(NamedTuple):
    """A parameter as the user defined it, in the place that holds it; in the first of several where it is tied."""

    parameter: nn.Parameter
    name: str
    """The full name, wrappers left out."""
    module: nn.Module
    """The module that owns the parameter there."""
    family: str
    """The name with every digit made 0: the same parameters of layers and experts share it."""
    lister: _Lister | None = None
    """The outermost module around it that lists what is not to decay, and that module's path with a dot at its end."""
    tied: tuple[ModelParameter, ...] = ()
    """The parameter in its other places, which name no places themselves."""

    @property
    def places(self) -> tuple[ModelParameter, ...]:
        """The parameter in every place, in the order of ``named_parameters``."""
        return (self, *self.tied)

    @property
    def names(self) -> list[str]:
        """Every name; ``named_parameters`` reports the first."""
        return [place.name for place in self.places]

    @property
    def shape(self) -> torch.Size:
        """The shape as the user defined it."""
        return original_shape(self.parameter)

    @property
    def ndim(self) -> int:
        """The number of dimensions as the user defined it."""
        return len(self.shape)


def model_parameters(module: nn.Module) -> list[ModelParameter]:
    """All parameters of a model, each once, in the order of ``named_parameters``.

    Args:
        module: any module, on any device (the meta device included), wrapped or not.

    Raises:
        ValueError: for a lazy parameter, which has no shape yet, for a model under FSDP1 that keeps only flat
            parameters (``use_orig_params=False``), and for two parameters of one name.

    >>> layer = nn.Linear(2, 2)
    >>> [p.names for p in model_parameters(nn.Sequential(layer, nn.ReLU(), layer))]
    [['0.weight', '2.weight'], ['0.bias', '2.bias']]
    """
    known: dict[int, ModelParameter] = {}  # by id, as a tensor's own hash is slow
    tied: dict[int, dict[str, ModelParameter]] = {}
    for place in _places(module):
        first = known.setdefault(id(place.parameter), place)
        if place.name != first.name:
            tied.setdefault(id(place.parameter), {}).setdefault(place.name, place)
    for key, places in tied.items():
        known[key] = known[key]._replace(tied=tuple(places.values()))
    by_name: dict[str, ModelParameter] = {}
    for parameter in known.values():
        if not _is_plain(parameter.parameter):
            _refuse_without_shape(parameter)
        if by_name.setdefault(parameter.name, parameter) is not parameter:
            raise ValueError(
                f"two parameters of {type(module).__name__} come to the name {parameter.name!r}, one in "
                f"{type(by_name[parameter.name].module).__name__} and one in {type(parameter.module).__name__}; rename "
                "one of the attributes"
            )
    return list(known.values())


def _refuse_without_shape(place: ModelParameter) -> None:
    if is_lazy(place.parameter):
        raise ValueError(
            f"parameter {place.name!r} of {type(place.module).__name__} has no shape yet (it is lazy); run one "
            "batch through the model before the optimizer is built, for example in configure_model()"
        )
    if getattr(place.parameter, "_is_flat_param", False):
        raise ValueError(
            f"FSDP has put the parameters of {type(place.module).__name__} into one flat parameter, where names "
            "and groups cannot be kept apart; wrap the model with use_orig_params=True"
        )


def plain_name(name: str) -> str:
    """A parameter's name without the parts that wrappers add.

    >>> plain_name("_orig_mod.body._checkpoint_wrapped_module.weight")
    'body.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def without_wrappers(module: nn.Module) -> nn.Module:
    """The user's module inside what ``torch.compile``, DDP, Fabric and the like have put around it."""
    while True:
        inside = next(
            (child for name, child in module._modules.items() if child is not None and _is_wrapped(module, name)), None
        )
        if inside is None:
            return module
        module = inside


class _Path(NamedTuple):
    """Where a module was come to."""

    name: str
    """Its name with a dot at its end, wrappers left out; empty for the model."""
    family: str
    above: tuple[nn.Module, ...]
    lister: _Lister | None


def _places(module: nn.Module) -> list[ModelParameter]:
    """Every parameter in every place, in the order of ``named_parameters``; no module is entered inside itself."""
    walk = _Walk()
    walk.visit(module, _Path("", "", (), None), None)
    return walk.places


class _Walk:
    """A way through the modules of a model.

    What is under a module is gone through once; again, by another path, only for the other names.
    """

    def __init__(self) -> None:
        self.places: list[ModelParameter] = []
        self._entered: set[int] = set()
        self._other_paths = 0
        self._class_lists: dict[type, bool] = {}  # models have few classes
        self._family_of = functools.cache(_family)  # of parts of names, which repeat
        self._reports_by_itself: Any = functools.cache(_reports_by_itself)

    def visit(self, module: nn.Module, path: _Path, again: dict[int, int] | None) -> None:
        """Note the places under a module.

        Args:
            module: the module.
            path: how it was come to.
            again: how often modules were entered on this other path; None on the first.
        """
        if again is None:
            self._entered.add(id(module))
        else:
            self._other_paths += 1
            again[id(module)] = again.get(id(module), 0) + 1
            if self._other_paths > _MOST_OTHER_PATHS or again[id(module)] > 4:
                return
        if path.lister is None and self._lists(module):
            path = path._replace(lister=(module, path.name))
        before = len(self.places)
        self.places.extend(_own_places(module, path, self._family_of))
        children = module._modules
        if len(children):
            _remember_flattened_by(module)
        around = (*path.above, module)
        # named_children() leaves out a module that is there twice.
        for name, child in children.items():
            if child is None or child in around:
                continue
            if _is_wrapped(module, name):
                inner = path._replace(above=around)
            else:
                family = f"{path.family}{self._family_of(name)}."
                inner = _Path(f"{path.name}{name}.", family, around, path.lister)
            is_first = again is None and id(child) not in self._entered
            self.visit(child, inner, None if is_first else {} if again is None else again)
        if self._reports_by_itself(type(module)):
            self.places[before:] = _as_reported(module, path, self.places[before:])

    def _lists(self, module: nn.Module) -> bool:
        # Of the class or the instance; getattr would ask torch's __getattr__, which is slow where there is nothing.
        cls = type(module)
        if cls not in self._class_lists:
            self._class_lists[cls] = any(hasattr(cls, method) for method in _LISTS)
        return self._class_lists[cls] or not _LISTS.isdisjoint(module.__dict__)


def _reports_by_itself(cls: Any) -> bool:
    """Whether a class of the user's has a ``named_parameters`` of its own."""
    owner = next(base for base in cls.__mro__ if "named_parameters" in vars(base))
    return not owner.__module__.startswith("torch.")


def _as_reported(module: nn.Module, path: _Path, places: list[ModelParameter]) -> list[ModelParameter]:
    """What a module says that it has, under the names that it says, and then in the places where it was found."""
    reported: list[ModelParameter] = []
    for name, parameter in module.named_parameters():
        full = path.name + plain_name(name)
        found = [place for place in places if place.parameter is parameter]
        first = found[0] if found else ModelParameter(parameter, full, module, _family(full), path.lister)
        reported += [first._replace(name=full, family=_family(full)), *(p for p in found if p.name != full)]
    return reported


def _own_places(module: nn.Module, path: _Path, family_of: Callable[[str], str]) -> list[ModelParameter]:
    """The parameters that a module has itself."""
    if isinstance(module, ParametrizationList):
        owner = path.above[-2] if len(path.above) > 1 else module
        originals = _originals(module, path.name)
        return [ModelParameter(p, name, owner, _family(name), path.lister) for p, name in originals]
    return [
        ModelParameter(parameter, path.name + name, module, path.family + family_of(name), path.lister)
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]


_ONE_DIGIT = str.maketrans("123456789", "000000000")


def _family(name: str) -> str:
    return name.translate(_ONE_DIGIT)


def _is_wrapped(module: nn.Module, name: str) -> bool:
    """Whether a child is the user's module, and the module around it a wrapper."""
    if isinstance(module, (DataParallel, DistributedDataParallel)):
        return name == "module"
    return name in _WRAPPED and not len(module._parameters) and set(module._modules.keys()) in _WRAPPERS


def _originals(parametrizations: ParametrizationList, path: str) -> Iterator[tuple[nn.Parameter, str]]:
    """The tensors behind a parametrized weight (weight norm and the like): they also go by the weight's plain name.

    ``torch.nn.utils.parametrize`` moves ``fc.weight`` to ``fc.parametrizations.weight.original``; the user wrote a
    ``weight`` of ``fc``.
    """
    owner_path, _, tensor_name = path.removesuffix(".").rpartition("parametrizations.")
    for name, parameter in parametrizations._parameters.items():
        if parameter is not None:
            yield parameter, path + name
            yield parameter, owner_path + tensor_name


class _Flattened(NamedTuple):
    """What FSDP1 knows of a parameter that it has flattened and cut up."""

    shape: torch.Size
    handle: weakref.ReferenceType[Any]
    """Its ``FlatParamHandle``."""


_flattened: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""From parameter to ``_Flattened``. FSDP1 keeps this in its wrappers, where a parameter alone does not lead."""


def remember_flattened(model: nn.Module) -> None:
    """Note what the parameters of a model under FSDP1 were; needed once, from the outermost wrapper or further out."""
    if dist.is_available() and dist.is_initialized():  # FSDP1 asks for that; a large model has many modules
        for module in model.modules():
            _remember_flattened_by(module)


def _remember_flattened_by(module: nn.Module) -> None:
    handle = getattr(module, "_handle", None) if "_fsdp_wrapped_module" in module._modules else None
    if handle is not None and handle.flat_param._params is not None:
        for parameter, shape in zip(handle.flat_param._params, handle.flat_param._shapes):
            _flattened[parameter] = _Flattened(shape, weakref.ref(handle))


def _flattened_by_fsdp1(tensor: torch.Tensor) -> _Flattened | None:
    if not getattr(tensor, "_fsdp_flattened", False):
        return None
    if tensor not in _flattened:
        raise ValueError(
            "a parameter was flattened by FSDP, and what it was is not known here; call build_decay_groups on the "
            "model with its outermost FSDP wrapper first"
        )
    return cast("_Flattened", _flattened[tensor])


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether nothing marks a tensor as a part of another: FSDP and DeepSpeed do so by attributes of the instance.

    To ask for an attribute that is not there is slow.
    """
    return type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.__dict__


def original_shape(tensor: torch.Tensor) -> torch.Size:
    """The shape of a parameter as the user defined it, also where this process holds a part of it, flattened."""
    if _is_plain(tensor):
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
    if _is_plain(tensor):
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
