"""Optimizer states without parameter names: which is whose, by the order of the model and the shapes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn

from lightning_regdecay.groups.parameters import ModelParameter

_MOST_WAYS = 64  # to put groups together, at a time
_MOST_TOLD = 8  # groups in a message
_WRITE_NAMES = (
    "write the names into the checkpoint, for each group as state['param_groups'][i]['param_names'] = [...] (in a "
    "checkpoint of Lightning state is checkpoint['optimizer_states'][0])"
)


def names_by_order(state_dict: Mapping[str, Any], known: Sequence[ModelParameter]) -> list[list[str]]:
    """Names for groups without any, which are in the order of ``model.parameters()``.

    Either the groups follow each other in that order; or each for itself is in it, as in "all weights, then all
    biases", which counts where the shapes in the state leave one way only.

    Args:
        state_dict: of an optimizer.
        known: the parameters of the model.

    Raises:
        ValueError: where neither is so.
    """
    groups = state_dict["param_groups"]
    states = [[state_dict["state"].get(key, {}) for key in group["params"]] for group in groups]
    count = sum(map(len, states))
    trainable = [parameter for parameter in known if parameter.parameter.requires_grad]
    for order in (known, trainable):
        numbers = None
        if len(order) == count:
            interleaved, ways = _interleaved(states, order)
            numbers = _one_after_the_other(states, groups, order) or (interleaved if ways == 1 else None)
        if numbers is not None:
            _tell([[order[number].name for number in own] for own in numbers], only_way=ways == 1)
            return [[order[number].name for number in own] for own in numbers]
    raise ValueError(
        f"the optimizer state in the checkpoint has no parameter names, and its {count} parameters in {len(groups)} "
        f"groups fit the {len(known)} of the model ({len(trainable)} trainable) in no way, or in several; "
        f"{_WRITE_NAMES}"
    )


def _tell(names: Sequence[Sequence[str]], only_way: bool) -> None:
    """Say how a state without names was read, louder where it could have been meant in another way."""
    text = "the optimizer state in the checkpoint has no parameter names: it is read in the order of model.parameters()"
    if only_way:
        rank_zero_info(text)
        return
    told = [f"{own[0]!r} to {own[-1]!r}" for own in names if own]
    groups = "; ".join(told[:_MOST_TOLD]) + (f"; and {len(told) - _MOST_TOLD} more" if len(told) > _MOST_TOLD else "")
    rank_zero_warn(
        f"{text}, group after group ({groups}), but shapes would allow other ways too; where that is wrong, "
        f"{_WRITE_NAMES}"
    )


def _one_after_the_other(
    states: Sequence[Sequence[Mapping[str, Any]]],
    groups: Sequence[Mapping[str, Any]],
    order: Sequence[ModelParameter],
) -> list[list[int]] | None:
    """The places in the order that each group has, where the groups follow each other in it."""
    in_a_row = [state for group in states for state in group]
    if not all(fits(state, parameter.parameter) for state, parameter in zip(in_a_row, order)):
        return None
    if len(states) > 1 and not any(map(shaped, in_a_row)) and not _have_equal_options(groups):
        return None  # nothing tells that it is this way
    ends = itertools.accumulate(map(len, states))
    return [list(range(end - len(group), end)) for group, end in zip(states, ends)]


def _interleaved(
    states: Sequence[Sequence[Mapping[str, Any]]], order: Sequence[ModelParameter]
) -> tuple[list[list[int]], int]:
    """The places in the order that each group has, where each for itself is in it; and the number of ways.

    2 stands for several, and for too many to try.
    """
    ways = [_Way(states)]
    for parameter in order:
        longer: dict[tuple[int, ...], _Way] = {}
        for way in ways:
            candidates = way.fitting(parameter.parameter)
            if len(candidates) > _MOST_WAYS:
                return [], 2
            for number, group in enumerate(candidates):
                # The last one needs no copy, which keeps the usual case, one way, in proportion to the parameters.
                longer_way = way if number == len(candidates) - 1 else way.copy()
                longer_way.give(group)
                same_place = longer.setdefault(tuple(longer_way.given), longer_way)
                if same_place is not longer_way:
                    same_place.count = 2
        if not longer:
            return [], 0
        if len(longer) > _MOST_WAYS:
            return [], 2
        ways = list(longer.values())
    (way,) = ways
    own: list[list[int]] = [[] for _ in states]
    for place, group in enumerate(way.turns):
        own[group].append(place)
    return own, way.count


class _Way:
    """A way to give out the states of groups, each group in its order, to parameters in theirs."""

    def __init__(self, states: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        self.states = states
        self.given = [0] * len(states)
        """How many of each group are given out."""
        self.turns: list[int] = []
        """Which group was in turn for each parameter."""
        self.count = 1
        """How many ways lead here."""
        self.next: dict[Any, list[int]] = {}
        """The groups by the shapes of the states that are next in them: many have the same."""
        for group in range(len(states)):
            self._wait(group)

    def copy(self) -> _Way:
        way = copy.copy(self)
        way.given, way.turns = list(self.given), list(self.turns)
        way.next = {shapes: list(groups) for shapes, groups in self.next.items()}
        return way

    def fitting(self, parameter: torch.Tensor) -> list[int]:
        """The groups whose next state can be of a parameter."""
        found: list[int] = []
        for groups in self.next.values():
            if groups and fits(self.states[groups[0]][self.given[groups[0]]], parameter):
                found += groups
        return found

    def give(self, group: int) -> None:
        self.next[_shapes(self.states[group][self.given[group]])].remove(group)
        self.given[group] += 1
        self.turns.append(group)
        self._wait(group)

    def _wait(self, group: int) -> None:
        if self.given[group] < len(self.states[group]):
            self.next.setdefault(_shapes(self.states[group][self.given[group]]), []).append(group)


def _shapes(state: Mapping[str, Any]) -> tuple[torch.Size, ...]:
    return tuple(tensor.shape for tensor in shaped(state))


def _have_equal_options(groups: Sequence[Mapping[str, Any]]) -> bool:
    keys = {key for group in groups for key in group} - {"params", "param_names", "name"}
    return all(same(group.get(key), groups[0].get(key)) for group in groups for key in keys)


def shaped(state: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors of a parameter's state that are more than one number."""
    return [value for value in state.values() if isinstance(value, torch.Tensor) and value.ndim > 0]


def fits(state: Mapping[str, Any], parameter: torch.Tensor) -> bool:
    """Whether a state can be of a parameter: some tensor of it has its shape, or is flat; or some are factors.

    Factors (of Adafactor) have 1 in the place of dimensions, each of which another one has, or are without one.
    """
    tensors = [tensor for tensor in shaped(state) if tensor.numel() > 1]
    shape = parameter.shape
    flat = (tensor for tensor in tensors if tensor.ndim != len(shape))
    if not tensors or any(t.shape == shape for t in tensors) or any(t.numel() == shape.numel() for t in flat):
        return True
    factors = [t.shape for t in tensors if t.ndim == len(shape) and all(a in (1, b) for a, b in zip(t.shape, shape))]
    without_one = {shape[:i] + shape[i + 1 :] for i in range(len(shape))}
    return len(tensors) > 1 and (
        all(any(factor[i] == size for factor in factors) for i, size in enumerate(shape))
        or all(tensor.shape in without_one for tensor in tensors)
    )


def same(a: Any, b: Any) -> bool:
    """Whether two values of an option are equal, tensors included."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return a is not None and b is not None and bool(torch.equal(torch.as_tensor(a), torch.as_tensor(b)))
    return bool(a == b)
