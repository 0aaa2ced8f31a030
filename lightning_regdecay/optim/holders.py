"""Optimizers that hold others, and what else stands around the one that steps."""

from __future__ import annotations

import math
import types
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

_PROXIES = {"LightningOptimizer", "_FabricOptimizer"}
"""What Lightning and Fabric give in the place of an optimizer: it has the optimizer's class, and nothing of its own."""
_OWN_OF_TORCH = {"defaults", "state", "param_groups"}
_DEPTH = 3  # objects inside each other that an optimizer is looked for in
_NO_HOLDERS = (torch.Tensor, nn.Module, LRScheduler, type, types.ModuleType, types.FunctionType, str, int, float)


def unwrapped(optimizer: Any) -> Any:
    """The optimizer behind what ``self.optimizers()`` and ``fabric.setup`` return."""
    while any(cls.__name__ in _PROXIES for cls in type(optimizer).__mro__):
        optimizer = optimizer.optimizer
    return optimizer


def is_optimizer(value: Any) -> bool:
    """Whether a value is an optimizer, of torch's class or only of its interface, or stands for one."""
    if isinstance(value, _NO_HOLDERS):
        return False
    try:
        return callable(getattr(value, "step", None)) and isinstance(getattr(value, "param_groups", None), list)
    except Exception:  # of whatever kind a property of others raises
        return False


def check_is_optimizer(value: Any) -> None:
    """Raise for what is no optimizer.

    Raises:
        TypeError: which says what it is.
    """
    if isinstance(value, type) or not is_optimizer(unwrapped(value)):
        what = value.__name__ if isinstance(value, type) else f"an object of type {type(value).__name__}"
        raise TypeError(f"optimizer must be an optimizer, with a step() and a list param_groups, got {what}")


def is_deepspeed(optimizer: Any) -> bool:
    """Whether an optimizer is of DeepSpeed, whose engine puts others in the place of parameters, and steps past it."""
    return type(optimizer).__module__.startswith("deepspeed.")


def steps_itself(optimizer: Any) -> bool:
    """Whether an optimizer has a ``step`` of its own; one that only passes all on to another has not."""
    return callable(getattr(type(optimizer), "step", None))


def with_held(optimizer: Any) -> list[Any]:
    """An optimizer and all that it holds for the same parameters, wherever; the outermost first.

    What only passes all on to another is left out.
    """
    found: list[Any] = []
    seen: set[int] = set()
    waiting = deque([optimizer])
    ids = _param_ids(optimizer) | _group_ids(optimizer)
    while waiting:
        one = unwrapped(waiting.popleft())
        # Under DeepSpeed ZeRO-3 param groups are shared, and empty between the steps.
        if id(one) in seen or not (one is optimizer or ids & (_param_ids(one) | _group_ids(one))):
            continue
        seen.add(id(one))
        if steps_itself(one):
            found.append(one)
        waiting += _optimizers_in(one)
    return found


def _optimizers_in(holder: Any) -> Iterator[Any]:
    """The optimizers that an object has as attributes, in lists and dictionaries, and in objects inside it."""
    seen = {id(holder)}
    waiting = [(value, 1) for value in _attributes(holder)]
    for value, depth in waiting:  # which grows
        if value is None or id(value) in seen or isinstance(value, _NO_HOLDERS):
            continue
        seen.add(id(value))
        if is_optimizer(value):
            yield value
        elif isinstance(value, (list, tuple)):
            waiting += [(entry, depth) for entry in value]
        elif isinstance(value, Mapping):
            waiting += [(entry, depth) for entry in value.values()]
        elif depth < _DEPTH:
            waiting += [(entry, depth + 1) for entry in _attributes(value)]


def _attributes(holder: Any) -> list[Any]:
    own = dict(getattr(holder, "__dict__", {}))
    for cls in type(holder).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            own.setdefault(name, getattr(holder, name, None))
    return [value for name, value in own.items() if name not in _OWN_OF_TORCH and "hooks" not in str(name)]


def _param_ids(optimizer: Any) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def families(optimizer: Any) -> list[list[Any]]:
    """Optimizers that step over the same param groups, together; the outermost first.

    Sharpness-aware minimization, Lookahead and the like share the list, or its dictionaries, with the optimizer inside.
    One that has dictionaries of its own for parameters that an optimizer inside updates (``ZeroRedundancyOptimizer``)
    hands the step on, so it is in no family.
    """
    every = with_held(optimizer)
    found: list[list[Any]] = []
    for one in every:
        ids = _group_ids(one)
        related = [family for family in found if any(ids & _group_ids(other) for other in family)]
        joined = [other for family in related for other in family]
        found = [family for family in found if family not in related] + [[*joined, one]]
    return [family for family in found if not _hands_on(family)]


def innermost(family: list[Any], group: Mapping[str, Any] | None = None) -> Any:
    """Of optimizers that step over the same param groups the one whose code decays weights: it holds no other.

    Args:
        family: the optimizers.
        group: a param group that it is to have.
    """
    leaves = [member for member in family if len(with_held(member)) == 1]
    having = [one for one in leaves if group is None or any(group is own for own in one.param_groups)]
    return [*having, *leaves, family[-1]][0]


def _hands_on(family: list[Any]) -> bool:
    inside = [held for one in family for held in with_held(one)[1:]]
    others = [one for one in inside if all(one is not member for member in family)]
    own = {key for one in family for key in _param_ids(one)}
    return any(own & _param_ids(one) for one in others)


def _group_ids(optimizer: Any) -> set[int]:
    return {id(group) for group in optimizer.param_groups}


def shared_lists(members: Iterable[Any]) -> list[list[dict[str, Any]]]:
    """The lists of param groups of a family, each once; without those that are made anew when they are asked for."""
    lists: list[list[dict[str, Any]]] = []
    for member in members:
        groups = member.param_groups
        if groups is member.param_groups and isinstance(groups, list) and all(groups is not known for known in lists):
            lists.append(groups)
    return lists


def refuse_numbered(family: Iterable[Any], among: Container[str] | None = None) -> None:
    """Raise for optimizers that keep something for each of their param groups, or keep these themselves.

    As ``base_lrs`` of AdaBound, and ``index2config`` of bitsandbytes: with other groups in the step, what they find
    there would be another group's.

    Args:
        family: the optimizers.
        among: the attributes that count, by default all: a list that grows may have the length by chance.

    Raises:
        ValueError: with the attribute.
    """
    for optimizer in family:
        name = next((name for name in numbered_by_group(optimizer) if among is None or name in among), None)
        if name is not None:
            raise ValueError(
                f"decay rules cannot be put in force in this {type(optimizer).__name__}: it has something for each of "
                f"its param groups in {name}, and would take that of another for parts of a group; build it over the "
                "decay groups (build_optimizer, or build_decay_groups(model, rules).as_param_groups())"
            )


def numbered_by_group(optimizer: Any) -> Iterator[str]:
    """The attributes in which an optimizer keeps its param groups, or something for each of them by the number."""
    groups = optimizer.param_groups
    ids = {id(group) for group in groups}
    for name, value in getattr(optimizer, "__dict__", {}).items():
        if name in _OWN_OF_TORCH or "hooks" in name or value is groups or is_optimizer(value):
            continue
        if _is_numbered(value, groups) or any(id(entry) in ids for entry in _entries(value)):
            yield str(name)
        elif not callable(value) and not isinstance(value, _NO_HOLDERS):
            inner = getattr(value, "__dict__", {})
            yield from (f"{name}.{key}" for key, entry in inner.items() if _has_numbers(entry, len(groups)))


def _entries(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, (list, tuple, deque)):
        yield from value


def _is_numbered(value: Any, groups: list[Any]) -> bool:
    """Whether a value has one entry for each param group.

    Of a list that is believed, as it is made to have entries; of a pair, an array and the like where each entry is an
    option of its param group.
    """
    if isinstance(value, Mapping):
        return _has_numbers(value, len(groups))
    if not isinstance(value, (list, tuple, deque)) and not getattr(value, "ndim", 0):
        return False
    if len(value) != len(groups):
        return False
    if isinstance(value, list):
        return not any(map(is_optimizer, value))
    return all(_is_option(entry, group) for entry, group in zip(value, groups))


def _is_option(entry: Any, group: Mapping[str, Any]) -> bool:
    try:
        number = float(entry)
    except (TypeError, ValueError):
        return False
    return any(type(option) is float and math.isclose(option, number, rel_tol=1e-6) for option in group.values())


def _has_numbers(value: Any, count: int) -> bool:
    """Whether a dictionary has the numbers of param groups as keys, or these and those of parameters in them."""
    if not isinstance(value, Mapping) or not value:
        return False
    firsts = [key[0] if isinstance(key, tuple) and key else key for key in value]
    return all(type(first) is int and 0 <= first < count for first in firsts)
