"""What the model has: names, shapes and owners of parameters, as the user wrote them, whatever wraps the modules."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from lightning_regdecay.groups.shards import is_plain, original_shape, remember_flattened_by

_WRAPPERS = (
    {"_orig_mod"},  # torch.compile
    {"_checkpoint_wrapped_module"},  # activation checkpointing
    {"_fsdp_wrapped_module"},  # FSDP1
    {"_forward_module"},  # lightning.fabric, what Fabric.setup returns
    {"_forward_module", "_original_module"},  # the same, which holds the model twice
)
"""The attributes under which wrappers hold the user's module, and nothing else: no part of a parameter's name."""
_WRAPPED = set().union(*_WRAPPERS)
_MOST_OTHER_PATHS, _SOME_OTHER_PATHS = 20_000, 5_000
"""Modules that are gone through again to find other names of what is shared, and how many where a graph of them
has more paths than could be listed."""

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
        if not is_plain(parameter.parameter):
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
        wrapped = _wrapped_in(module)
        inside = next((c for name, c in module._modules.items() if c is not None and name in wrapped), None)
        if inside is None:
            return module
        module = inside


def class_of(module: nn.Module) -> type:
    """The class of a module as the user wrote it: of a scripted or traced one, torch knows only the name."""
    if not isinstance(module, torch.jit.ScriptModule):
        return type(module)
    name = str(module.original_name)
    known = getattr(nn, name, None)
    return known if isinstance(known, type) else _class_of_name(name)


@functools.cache
def _class_of_name(name: str) -> type:
    return type(name, (nn.Module,), {})


class _Path(NamedTuple):
    """Where a module was come to."""

    name: str
    """Its name with a dot at its end, wrappers left out; empty for the model."""
    family: str
    above: tuple[nn.Module, ...]
    lister: _Lister | None


def _places(module: nn.Module) -> list[ModelParameter]:
    """Every parameter in every place, in the order of ``named_parameters``; no module is entered inside itself."""
    walk = _Walk(module)
    walk.visit(module, _Path("", "", (), None), None)
    # As for torch, that of the outermost module alone counts.
    users = without_wrappers(module)
    return _as_reported(users, walk.places) if _reports_by_itself(users) else walk.places


class _Walk:
    """A way through the modules of a model.

    What is under a module is gone through once; again, by another path, only for the other names.

    Args:
        module: the model.
    """

    def __init__(self, module: nn.Module) -> None:
        self.places: list[ModelParameter] = []
        self._module = module
        self._entered: set[int] = set()
        self._other_paths = 0
        self._class_lists: dict[type, bool] = {}  # models have few classes
        self._family_of = functools.cache(_family)  # of parts of names, which repeat

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
            most = _MOST_OTHER_PATHS if self._are_few_paths else _SOME_OTHER_PATHS
            if self._other_paths > most or (again[id(module)] > 4 and not self._are_few_paths):
                return
        if path.lister is None and self._lists(module):
            path = path._replace(lister=(module, path.name))
        if len(module._parameters):
            self.places.extend(_own_places(module, path, self._family_of))
        children = module._modules
        if not len(children):
            return
        remember_flattened_by(module)
        wrapped, family_of = _wrapped_in(module), self._family_of
        prefix, family, above, lister = path
        around = (*above, module)
        # named_children() leaves out a module that is there twice.
        for name, child in children.items():
            if child is None or child in around:
                continue
            if name in wrapped:
                inner = path._replace(above=around)
            else:
                inner = _Path(f"{prefix}{name}.", f"{family}{family_of(name)}.", around, lister)
            is_first = again is None and id(child) not in self._entered
            self.visit(child, inner, None if is_first else {} if again is None else again)

    @functools.cached_property
    def _are_few_paths(self) -> bool:
        """Whether all names of what is shared can be listed."""
        return _count_of_paths(self._module) <= _MOST_OTHER_PATHS

    def _lists(self, module: nn.Module) -> bool:
        # Of the class or the instance; getattr would ask torch's __getattr__, which is slow where there is nothing.
        cls = type(module)
        if cls not in self._class_lists:
            self._class_lists[cls] = any(hasattr(cls, method) for method in _LISTS)
        return self._class_lists[cls] or not _LISTS.isdisjoint(module.__dict__)


def _count_of_paths(module: nn.Module) -> float:
    """The modules on all paths through a model, infinite where a module is inside itself."""
    counts: dict[nn.Module, float] = {}

    def count(module: nn.Module) -> float:
        if module not in counts:
            counts[module] = math.inf  # should it be come to again before it is counted
            counts[module] = 1 + sum(count(child) for child in module._modules.values() if child is not None)
        return counts[module]

    return count(module)


def _reports_by_itself(module: nn.Module) -> bool:
    """Whether a module has a ``named_parameters`` of the user's."""
    owner = next(base for base in type(module).__mro__ if "named_parameters" in vars(base))
    return "named_parameters" in vars(module) or not owner.__module__.startswith("torch.")


def _as_reported(module: nn.Module, places: list[ModelParameter]) -> list[ModelParameter]:
    """What a module says that it has, under the names that it says, and then in the places where it was found."""
    found: dict[int, list[ModelParameter]] = {}
    for place in places:
        found.setdefault(id(place.parameter), []).append(place)
    reported: list[ModelParameter] = []
    for name, parameter in module.named_parameters():
        full, family = plain_name(name), _family(plain_name(name))
        places = found.get(id(parameter), [])
        first = places[0] if places else ModelParameter(parameter, full, module, family)
        reported += [first._replace(name=full, family=family), *(place for place in places if place.name != full)]
    return reported


def _own_places(module: nn.Module, path: _Path, family_of: Callable[[str], str]) -> list[ModelParameter]:
    """The parameters that a module has itself."""
    if isinstance(module, ParametrizationList):
        owner = path.above[-2] if len(path.above) > 1 else module
        originals = _originals(module, path.name)
        return [ModelParameter(p, name, owner, _family(name), path.lister) for p, name in originals]
    found = []
    prefix, family, _, lister = path
    for key, parameter in module._parameters.items():
        if parameter is not None:
            for name in (key, *_plain_names(module, key)) if key.endswith(_RENAMED) else (key,):
                found.append(ModelParameter(parameter, prefix + name, module, family + family_of(name), lister))
    return found


_RENAMED = ("_orig", "_g", "_v")
"""What pruning, spectral norm and weight norm of ``torch.nn.utils`` put behind a parameter's name."""


def _plain_names(module: nn.Module, name: str) -> list[str]:
    """The name that the user gave a parameter, where another tensor has that in its place."""
    plain = name.rpartition("_")[0]
    return [plain] if isinstance(vars(module).get(plain), torch.Tensor) else []


_ONE_DIGIT = str.maketrans("123456789", "000000000")


def _family(name: str) -> str:
    return name.translate(_ONE_DIGIT)


def _wrapped_in(module: nn.Module) -> Collection[str]:
    """The names of the children that are the user's modules, of a module around them that is a wrapper."""
    if isinstance(module, (DataParallel, DistributedDataParallel)):
        return ("module",)
    children = module._modules.keys()
    return children if not len(module._parameters) and set(children) in _WRAPPERS else ()


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
