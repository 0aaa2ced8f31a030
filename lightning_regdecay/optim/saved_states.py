"""What checkpoints hold of an optimizer, by parameter name."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_regdecay.groups.groups import NAMES_KEY
from lightning_regdecay.groups.parameters import ModelParameter, plain_name
from lightning_regdecay.optim.starts import START_KEY
from lightning_regdecay.optim.unnamed import names_by_order
from lightning_regdecay.rules.schedules import STEP_KEY

IDENTITY_KEYS = {"params", "param_names", "name", NAMES_KEY}
"""What a param group is, beside how it is trained."""


def names_in(group: Mapping[str, Any]) -> Sequence[str]:
    """The names of its parameters that a param group holds, empty where it holds none."""
    return group.get(NAMES_KEY) or group.get("param_names") or ()


class SavedState(NamedTuple):
    """What a checkpoint holds of an optimizer, by parameter name."""

    groups: list[dict[str, Any]]
    """Its param groups."""
    group_of: dict[str, int]
    """Parameter name to the number of its group."""
    key_of: dict[str, Any]
    """Parameter name to its key in the state."""
    keys: set[Any]
    """All keys in the state that are of parameters."""
    state: dict[Any, Any]


def read_state(
    state_dict: Mapping[str, Any], groups: list[dict[str, Any]] | None, known: Sequence[ModelParameter]
) -> SavedState:
    """A state of an optimizer by parameter name.

    Args:
        state_dict: of an optimizer.
        groups: the param groups, where ``torch.distributed.checkpoint`` has left those of the state incomplete.
        known: the parameters of the model.
    """
    names = saved_names(state_dict["param_groups"], state_dict, known)
    key_of: dict[str, Any] = {}
    for group, own in zip(state_dict["param_groups"], names):
        for name, key in zip(own, group["params"]):
            key_of.setdefault(name, key)  # the first of parameters that are tied by now
    keys = {key for group in state_dict["param_groups"] for key in group["params"]}
    if groups is None:
        groups = state_dict["param_groups"]
    else:
        names = saved_names(groups, state_dict, known)
    group_of = {name: number for number, own in enumerate(names) for name in own if name}
    key_of.pop("", None)
    return SavedState(groups, group_of, key_of, keys, dict(state_dict["state"]))


def first_names(names: Iterable[Iterable[str]], known: Sequence[ModelParameter]) -> list[list[str]]:
    """The names of the parameters of each group without wrappers; of a tied parameter the first."""
    first = {name: parameter.name for parameter in known for name in parameter.names}
    first.update((parameter.name, parameter.name) for parameter in known)  # where the names of two are swapped
    plain = [[plain_name(name) for name in own] for own in names]
    given = {name for own in plain for name in own if name}
    if first and given and given.isdisjoint(first):
        renamed = _with_prefix(given, first)
        plain = [[renamed.get(name, name) for name in own] for own in plain]
    return [[first.get(name, name) for name in own] for own in plain]


def _with_prefix(given: set[str], known: Collection[str]) -> dict[str, str]:
    """Names as the model has them for names of which it has not one, because they were made from a part of it.

    Raises:
        ValueError: where no prefix, or more than one, makes all of them names of the model.
    """
    one = next(iter(given))
    longer = {name.removesuffix(one) for name in known if name.endswith(f".{one}")}
    ways = [{name: prefix + name for name in given} for prefix in longer]
    shorter = {one[: len(one) - len(name)] for name in known if one.endswith(f".{name}")}
    ways += [{name: name.removeprefix(prefix) for name in given} for prefix in shorter]
    fitting = [way for way in ways if all(name in known for name in way.values())]
    if len(fitting) != 1:
        raise ValueError(
            f"not one of the parameters that the optimizer state in the checkpoint names ({one!r} and others) is of "
            f"the model ({next(iter(known))!r} and others), and it is not clear which is which; resume with the model "
            "that it is of, or start the run from the weights alone"
        )
    return fitting[0]


def sharded_checkpoint(trainer: Any) -> Any:
    """The checkpoint that the strategy of a Trainer is loading by itself into sharded parameters, None without one."""
    if trainer is None or trainer.strategy.lightning_restore_optimizer:
        return None
    return trainer.ckpt_path if any(hasattr(p, "device_mesh") for p in trainer.model.parameters()) else None


def look_into_checkpoints(rooms: Iterable[Any], trainer: Callable[[], Any]) -> None:
    """Let rooms look into the sharded checkpoint that is being loaded, should there be one, for what is theirs in it.

    Args:
        rooms: of optimizers.
        trainer: tells the Trainer.
    """

    def folder() -> Path | None:
        checkpoint = sharded_checkpoint(trainer())
        return Path(checkpoint) if checkpoint is not None and Path(checkpoint).is_dir() else None

    def has_counts() -> bool:
        path = folder()
        return path is None or any(STEP_KEY in group for groups in groups_in_folder(path) for group in groups)

    def has_starts() -> bool:
        path = folder()
        return path is None or has_in_states(path, START_KEY)

    for room in rooms:
        room.counts_in_checkpoint, room.starts_in_checkpoint = has_counts, has_starts


def has_in_states(path: Path, key: str) -> bool:
    """Whether the state of a parameter has something under a key, in a folder of ``torch.distributed.checkpoint``."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    metadata = FileSystemReader(path).read_metadata()
    places = (metadata.planner_data or {}).values()
    return any(str(place[-1]) == key or str(place[-1]).endswith(f".{key}") for place in places if place)


def groups_in_folder(path: Path) -> list[list[dict[str, Any]]]:
    """The param groups of each optimizer in a folder of ``torch.distributed.checkpoint``; none of a flattened state.

    A flattened state has the options of each parameter by its name, so that torch finds them itself.
    """
    # Slow to import, and of no use to most.
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    # planner_data of torch (2.6 to 2.13) has for each key the path to it, as a tuple.
    reader = FileSystemReader(path)
    metadata = reader.read_metadata()
    places = {key: place for key, place in (metadata.planner_data or {}).items() if "param_groups" in place}
    if not places:
        parts = [str(part) for place in (metadata.planner_data or {}).values() for part in place]
        if any(part.startswith("param_groups.") for part in parts):
            return []
        raise ValueError(f"the checkpoint {str(path)!r} has no optimizer state")
    found: dict[str, Any] = {}
    for key in places:
        stored = metadata.state_dict_metadata[key]
        # Where a value is no tensor, anything holds its place.
        found[key] = (
            torch.empty(stored.size, dtype=stored.properties.dtype)
            if isinstance(stored, TensorStorageMetadata)
            else None
        )
    load(found, storage_reader=reader)
    # Such as ("optimizer_0", "param_groups", 2, "decay_schedule", "start") in nested dictionaries.
    tree: dict[Any, Any] = {}
    for key, place in places.items():
        inner = tree
        cut = place.index("param_groups")
        for part in (place[:cut], *place[cut + 1 : -1]):
            inner = inner.setdefault(part, {})
        inner[place[-1]] = found[key]
    return [[groups[number] for number in sorted(groups)] for groups in tree.values()]


def groups_in_file(path: Path) -> list[list[dict[str, Any]]]:
    """The param groups of each optimizer in a checkpoint of Lightning in one file."""
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{str(path)!r} holds objects that torch.load refuses with weights_only=True, so it cannot be read which "
            "parameter was in which group; resume from a checkpoint of plain data, or start the run from the weights "
            "alone"
        ) from error
    if "optimizer_states" not in checkpoint:
        raise ValueError(
            f"{str(path)!r} is no checkpoint of Lightning with optimizer states; a checkpoint of "
            "torch.distributed.checkpoint is a folder"
        )
    return [state["param_groups"] for state in checkpoint["optimizer_states"]]


def saved_names(
    groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any], known: Sequence[ModelParameter]
) -> list[list[str]]:
    """The names of the parameters of each param group of a checkpoint, without wrappers; of a tied one the first."""
    if all(isinstance(key, str) for group in groups for key in group["params"]):  # of torch.distributed.checkpoint
        return first_names([group["params"] for group in groups], known)
    names = [list(names_in(group)) if len(names_in(group)) == len(group["params"]) else None for group in groups]
    given = [name for own in names if own for name in own]
    check_names(given, "the optimizer state in the checkpoint")
    found = iter(first_names([own for own in names if own is not None], known))
    every = [None if own is None else next(found) for own in names]
    if None in every:
        taken = {name for own in every if own for name in own}
        left = [parameter for parameter in known if parameter.name not in taken]
        nameless = [group for group, own in zip(groups, every) if own is None]
        if not left:
            return with_names_outside([own or [""] * len(group["params"]) for group, own in zip(groups, every)])
        read = iter(names_by_order({**state_dict, "param_groups": nameless}, left))
        return [next(read) if own is None else own for own in every]
    return [own for own in every if own is not None]


def with_names_outside(names: Iterable[Sequence[str]]) -> list[list[str]]:
    """Names of parameters, each without one by its number: what is in an optimizer and not of the model, in order."""
    numbers = itertools.count()
    return [[name or f"number {next(numbers)} outside the model" for name in own] for own in names]


def check_names(names: Iterable[str], whose: str) -> None:
    """Raise where a name is that of two parameters: which state is whose could not be told.

    Args:
        names: of all parameters, empty where one has none.
        whose: what has the names.
    """
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        raise ValueError(
            f"{whose} has two parameters of the name {twice[0]!r}, so it cannot be told which state is whose; build "
            "the groups over one module that holds them all, such as nn.ModuleDict({'a': a, 'b': b})"
        )
