"""Learning rate schedulers of torch, whose lists have an entry per param group, when the groups have changed."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


_OF_SEVERAL = (lr_scheduler.SequentialLR, lr_scheduler.ChainedScheduler)


class CarriedGroups:
    """How the param groups of today come from those of a checkpoint, and which lr schedulers followed that."""

    def __init__(self) -> None:
        self.sources: list[int | None] | None = None
        """For every param group of today, the number of the one that it goes on from; None before a state was
        loaded."""
        self.saved_count = 0
        """How many param groups the checkpoint has."""
        self._followed: list[tuple[weakref.ref[Any], Any]] = []
        """Each lr scheduler that has followed, with the state that it did so with."""
        self._since: list[weakref.ref[Any]] = []
        """Those that have followed since the optimizer has loaded its state."""
        self._early: dict[int, Callable[[], None]] = {}
        """What loads the states again that were loaded before that."""

    def take(self, sources: list[int | None], saved_count: int) -> None:
        """Note how the groups of an optimizer's state go on; lr schedulers that were loaded before it follow."""
        self.sources, self.saved_count, self._since = sources, saved_count, []
        early, self._early = self._early, {}
        for load in early.values():
            load()

    def is_due(self, scheduler: Any, state: Any, today: Any) -> bool:
        """Whether a state that an lr scheduler loads is of the checkpoint's groups.

        It is where it goes with the optimizer's: the first one after that, and the same again. The next ones, and what
        the scheduler has itself, are of today's.

        Args:
            scheduler: the lr scheduler.
            state: what it loads.
            today: its own state.
        """
        if self.sources is None or _equal(state, today):
            return False
        if any(reference() is scheduler and _equal(state, known) for reference, known in self._followed):
            return True
        if any(reference() is scheduler for reference in self._since):
            return False
        self.note(scheduler, state)
        return True

    def note(self, scheduler: Any, state: Any) -> None:
        """Note that an lr scheduler loads a state of the checkpoint's groups."""
        self._since.append(weakref.ref(scheduler))
        self._followed = [entry for entry in self._followed if entry[0]() not in (None, scheduler)]
        self._followed.append((weakref.ref(scheduler), copy.deepcopy(state)))

    def note_early(self, scheduler: Any, load: Callable[[], None]) -> None:
        """Note that an lr scheduler has loaded its state before the optimizer.

        Args:
            scheduler: the lr scheduler.
            load: loads it again.
        """
        self._early[id(scheduler)] = load


def with_inner(schedulers: Iterable[Any]) -> list[Any]:
    """Lr schedulers and those that a user's class has inside. The ones inside of torch's own follow with these."""
    found: list[Any] = []
    waiting = list(schedulers)
    for scheduler in waiting:  # which grows
        if scheduler is None or any(scheduler is one for one in found):
            continue
        found.append(scheduler)
        if isinstance(scheduler, lr_scheduler.LRScheduler) and not isinstance(scheduler, _OF_SEVERAL):
            waiting += [value for value in vars(scheduler).values() if isinstance(value, lr_scheduler.LRScheduler)]
    return found


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
    is_early = carried.sources is None
    is_carried = is_early or carried.is_due(scheduler, state_dict, _own_state(scheduler))
    result = _load_of_class(scheduler, carried if is_carried else None, state_dict, args, kwargs)
    if is_early:
        reference, steps = weakref.ref(scheduler), _steps(scheduler)

        def again() -> None:
            scheduler = reference()
            if scheduler is not None and _steps(scheduler) == steps:  # not where it has gone on since
                carried.note(scheduler, state_dict)
                _load_of_class(scheduler, carried, state_dict, args, kwargs)

        carried.note_early(scheduler, again)
    return result


def _load_of_class(scheduler: Any, carried: CarriedGroups | None, state: Any, args: Any, kwargs: Any) -> Any:
    """Load a state by the class's own method, with its lists carried where they are to be."""
    if carried is not None:
        groups = scheduler.optimizer.param_groups
        state = _regrouped(scheduler, state, groups, carried.sources, carried.saved_count)
    with _without_ours(scheduler):
        return type(scheduler).load_state_dict(scheduler, state, *args, **kwargs)


def _own_state(scheduler: Any) -> Any:
    try:
        with _without_ours(scheduler):
            return type(scheduler).state_dict(scheduler)
    except TypeError:  # of a user's class that asks for more
        return None


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except (RuntimeError, ValueError):  # of tensors and arrays
        return False


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
    if isinstance(scheduler, _OF_SEVERAL):
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
