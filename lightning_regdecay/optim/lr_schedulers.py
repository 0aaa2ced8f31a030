"""Learning rate schedulers of torch, whose lists have an entry per param group, when the groups have changed."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import lr_scheduler

_PER_GROUP: dict[type, tuple[str, ...]] = {
    lr_scheduler.LRScheduler: ("base_lrs", "_last_lr"),
    lr_scheduler.LambdaLR: ("lr_lambdas",),
    lr_scheduler.MultiplicativeLR: ("lr_lambdas",),
    lr_scheduler.CyclicLR: ("max_lrs", "base_momentums", "max_momentums"),
    lr_scheduler.ReduceLROnPlateau: ("min_lrs",),
}
"""What torch's classes (2.6 to 2.13) hold with an entry per param group. All else goes through as it is: what a user's
own scheduler holds may be a pair, or a list over time."""


@dataclass
class CarriedGroups:
    """How the param groups of today come from those of a checkpoint."""

    sources: list[int | None] | None = None
    """For every param group of today, the number of the one that it goes on from; None before a state was loaded."""
    saved_count: int = 0
    """How many param groups the checkpoint has."""


def carry_lr_scheduler(scheduler: Any, carried: CarriedGroups) -> list[Callable[[], None]]:
    """Let the state of an lr scheduler follow the groups.

    Returns:
        What makes it as it was.
    """
    # Partials, which are copied and pickled with the scheduler.
    load = functools.partial(_load_regrouped, scheduler, carried)
    save = functools.partial(_state_dict, scheduler)
    return [set_on_instance(scheduler, "load_state_dict", load), set_on_instance(scheduler, "state_dict", save)]


def set_on_instance(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Put a value over a method of the class.

    Returns:
        What takes it away again, unless another has come over it.
    """
    reference, before = weakref.ref(owner), vars(owner).get(name)
    setattr(owner, name, value)

    def undo() -> None:
        owner = reference()
        if owner is not None and vars(owner).get(name) is value:
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

    return undo


def _load_regrouped(scheduler: Any, carried: CarriedGroups, state_dict: Mapping[str, Any]) -> None:
    regrouped = _regrouped(scheduler, state_dict, scheduler.optimizer.param_groups, carried)
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
    if "_schedulers" in state_dict:  # of SequentialLR and ChainedScheduler
        inner = zip(getattr(scheduler, "_schedulers", ()), state_dict["_schedulers"])
        regrouped["_schedulers"] = [_regrouped(one, state, groups, carried) for one, state in inner]
    for key in [key for cls in type(scheduler).__mro__ for key in _PER_GROUP.get(cls, ())]:
        value = state_dict.get(key)
        if not isinstance(value, (list, tuple)):
            continue
        if carried.sources is None:
            if len(value) != len(groups):
                raise ValueError(
                    f"the state of {type(scheduler).__name__} in the checkpoint is of {len(value)} param groups, today "
                    f"there are {len(groups)}; load the state of the optimizer first, which tells how they belong "
                    "together"
                )
        elif len(value) == carried.saved_count:
            new = [group["lr"] for group in groups] if key == "_last_lr" else getattr(scheduler, key)
            entries = [new[i] if source is None else value[source] for i, source in enumerate(carried.sources)]
            # Functions are not saved: in the state of a LambdaLR, None is in the place of each.
            regrouped[key] = [None if callable(entry) else entry for entry in entries]
    return regrouped
