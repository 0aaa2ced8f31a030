"""Learning rate schedulers, whose lists have an entry per param group, when the groups change."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

PER_GROUP = re.compile(r"(lr|lrs|momentums?|betas?|lambdas?|values)$")
"""Names of lists with an entry per param group."""


@dataclass
class CarriedGroups:
    """How the param groups of today come from those of a checkpoint."""

    sources: list[int | None] | None = None
    """For every param group of today, the number of the one that it goes on from; None before a state was loaded."""
    saved_count: int = 0
    """How many param groups the checkpoint has."""


def expanded(values: Mapping[str, Any], parents: Sequence[int]) -> dict[str, Any]:
    """Those of the values that have an entry per param group, with one for each part of the groups.

    >>> expanded({"max_lr": [0.1, 0.2], "milestones": [3, 5]}, parents=[0, 0, 1])
    {'max_lr': [0.1, 0.1, 0.2]}
    """
    return {
        name: type(value)(value[parent] for parent in parents)
        for name, value in values.items()
        if type(value) in (list, tuple) and len(value) == parents[-1] + 1 and PER_GROUP.search(name)
    }


def expand_attributes(scheduler: Any, parents: Sequence[int]) -> None:
    """Give a scheduler, and those inside it, an entry for each part that the param groups were cut into."""
    vars(scheduler).update(expanded(vars(scheduler), parents))
    for inner in getattr(scheduler, "_schedulers", []):  # of SequentialLR and ChainedScheduler
        expand_attributes(inner, parents)


def carry_lr_scheduler(scheduler: Any, optimizer: Optimizer, carried: CarriedGroups) -> None:
    """Let the state of an lr scheduler, whose lists have an entry per param group, follow the groups."""
    # Partials, which are copied and pickled with the scheduler.
    scheduler.load_state_dict = functools.partial(_load_regrouped, scheduler, optimizer, carried)
    scheduler.state_dict = functools.partial(_state_dict, scheduler)


def _load_regrouped(
    scheduler: Any, optimizer: Optimizer, carried: CarriedGroups, state_dict: Mapping[str, Any]
) -> None:
    regrouped = _regrouped(scheduler, state_dict, optimizer.param_groups, carried)
    type(scheduler).load_state_dict(scheduler, regrouped)


def _state_dict(scheduler: Any) -> dict[str, Any]:
    state: dict[str, Any] = type(scheduler).state_dict(scheduler)
    # torch's schedulers (2.6 to 2.13) save every attribute, and so these two.
    return {key: value for key, value in state.items() if key not in ("load_state_dict", "state_dict")}


def _regrouped(
    scheduler: Any, state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], carried: CarriedGroups
) -> dict[str, Any]:
    """The state of an lr scheduler with its lists in the order of today's param groups."""
    regrouped = dict(state_dict)
    for key, value in state_dict.items():
        if key == "_schedulers":  # of SequentialLR and ChainedScheduler
            inner = zip(scheduler._schedulers, value)
            regrouped[key] = [_regrouped(scheduler, state, groups, carried) for scheduler, state in inner]
        elif isinstance(value, (list, tuple)) and PER_GROUP.search(key):
            if carried.sources is None:
                if len(value) != len(groups):
                    raise ValueError(
                        f"the state of {type(scheduler).__name__} in the checkpoint is of {len(value)} param groups, "
                        f"today there are {len(groups)}; load the state of the optimizer first, which tells how they "
                        "belong together"
                    )
            elif len(value) == carried.saved_count:
                new = [group["lr"] for group in groups] if key == "_last_lr" else getattr(scheduler, key)
                entries = [new[i] if source is None else value[source] for i, source in enumerate(carried.sources)]
                # Functions are not saved: in the state of a LambdaLR, None is in the place of each.
                regrouped[key] = [None if callable(entry) else entry for entry in entries]
    return regrouped
