"""Learning rate schedulers of torch, whose lists have an entry per param group, when the groups have changed."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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


class CarriedGroups:
    """How the param groups of today come from those of a checkpoint, and which lr schedulers followed that."""

    def __init__(self) -> None:
        self.sources: list[int | None] | None = None
        """For every param group of today, the number of the one that it goes on from; None before a state was
        loaded."""
        self.saved_count = 0
        """How many param groups the checkpoint has."""
        self._done: list[weakref.ref[Any]] = []
        self._early: list[Callable[[], None]] = []

    def take(self, sources: list[int | None], saved_count: int) -> None:
        """Note how the groups of an optimizer's state go on; lr schedulers that were loaded before it follow."""
        self.sources, self.saved_count, self._done = sources, saved_count, []
        early, self._early = self._early, []
        for load in early:
            load()

    def is_due(self, scheduler: Any) -> bool:
        """Whether an lr scheduler loads the state that goes with the optimizer's; the next one is of today's groups."""
        if self.sources is None or any(reference() is scheduler for reference in self._done):
            return False
        self._done.append(weakref.ref(scheduler))
        return True

    def is_early(self, load: Callable[[], None]) -> None:
        """Note that an lr scheduler has loaded its state before the optimizer.

        Args:
            load: loads it again.
        """
        self._early.append(load)


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


def _load_regrouped(scheduler: Any, carried: CarriedGroups, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
    groups = scheduler.optimizer.param_groups
    is_early = carried.sources is None
    if is_early:
        regrouped = _regrouped(scheduler, state_dict, groups, None, 0)
    elif carried.is_due(scheduler):
        regrouped = _regrouped(scheduler, state_dict, groups, carried.sources, carried.saved_count)
    else:
        regrouped = state_dict
    with _without_ours(scheduler):
        result = type(scheduler).load_state_dict(scheduler, regrouped, *args, **kwargs)
    if is_early:
        reference, steps = weakref.ref(scheduler), _steps(scheduler)

        def again() -> None:
            scheduler = reference()
            if scheduler is not None and _steps(scheduler) == steps:  # not where it has gone on since
                _load_regrouped(scheduler, carried, state_dict, *args, **kwargs)

        carried.is_early(again)
    return result


def _steps(scheduler: Any) -> tuple[Any, Any]:
    return getattr(scheduler, "last_epoch", None), getattr(scheduler, "_step_count", None)


def _state_dict(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    with _without_ours(scheduler):  # torch's schedulers (2.6 to 2.13) save every attribute
        return type(scheduler).state_dict(scheduler, *args, **kwargs)


@contextmanager
def _without_ours(scheduler: Any) -> Iterator[None]:
    """An lr scheduler as it is without what hangs on it."""
    own = vars(scheduler)
    ours = {
        name: value
        for name, value in own.items()
        if isinstance(value, functools.partial) and value.func in (_load_regrouped, _state_dict)
    }
    for name in ours:
        del own[name]
    try:
        yield
    finally:
        own.update(ours)


def _regrouped(
    scheduler: Any,
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    sources: Sequence[int | None] | None,
    saved_count: int,
) -> dict[str, Any]:
    """The state of an lr scheduler with its lists in the order of today's param groups."""
    regrouped = dict(state_dict)
    if isinstance(scheduler, (lr_scheduler.SequentialLR, lr_scheduler.ChainedScheduler)):
        inner, states = scheduler._schedulers, state_dict.get("_schedulers", ())
        if len(inner) == len(states):
            pairs = zip(inner, states)
            regrouped["_schedulers"] = [_regrouped(one, state, groups, sources, saved_count) for one, state in pairs]
    for key in [key for cls in type(scheduler).__mro__ for key in _PER_GROUP.get(cls, ())]:
        value = state_dict.get(key)
        if not isinstance(value, (list, tuple)):
            continue
        if sources is None:
            if len(value) != len(groups):
                raise ValueError(
                    f"the state of {type(scheduler).__name__} in the checkpoint is of {len(value)} param groups, today "
                    f"there are {len(groups)}; load the state of the optimizer first, which tells how they belong "
                    "together"
                )
        elif len(value) == saved_count:
            new = [group["lr"] for group in groups] if key == "_last_lr" else getattr(scheduler, key)
            entries = [new[i] if source is None else value[source] for i, source in enumerate(sources)]
            # Functions are not saved: in the state of a LambdaLR, None is in the place of each.
            regrouped[key] = [None if callable(entry) else entry for entry in entries]
    return regrouped
