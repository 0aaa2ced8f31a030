"""What goes on in a step: rules in force while the optimizer's own code runs, and out of force for all other code.

Each list of param groups is filled with what the rules make of it right before the code of the optimizer runs, and
holds what it held before while a closure runs, while hooks of others run, and when the step has ended.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import is_
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch

from lightning_regdecay.optim.by_element import Lent
from lightning_regdecay.optim.frames import (
    caller_of,
    flat_state_to_load,
    is_alive,
    is_called_by_deepspeed,
    is_rehearsal,
    is_running,
)
from lightning_regdecay.optim.holders import shared_lists
from lightning_regdecay.optim.parting import Parting
from lightning_regdecay.optim.pulling import UNDER_DEEPSPEED, decay_parts, is_skipped
from lightning_regdecay.optim.seen import Group, version_of
from lightning_regdecay.optim.starts import START_KEY
from lightning_regdecay.rules.schedules import STEP_KEY

_LONGEST_STEP, _TICK = 60.0, 1e-3  # in seconds


class Watcher(Protocol):
    """Looks on while optimizers step."""

    def begin(self, optimizer: Any) -> None:
        """The step of an optimizer around others begins, which may move weights before the gradients are there."""

    def before(self, optimizer: Any) -> None:
        """Gradients are those that the step goes by, and weights those before it."""

    def after(self, optimizer: Any) -> None:
        """The step is done."""


class Room(Protocol):
    """What a step needs to know of the optimizers."""

    parting: Parting
    watchers: list[Watcher]
    is_armed: bool
    fit_is_over: Callable[[], bool]
    starts_in_checkpoint: Callable[[], bool]

    @property
    def members(self) -> list[Any]:
        """The optimizers that step over the same param groups."""

    def is_leaf(self, optimizer: Any) -> bool:
        """Whether an optimizer steps by itself, and is no wrapper of another."""

    def place_of_closure(self, optimizer: Any) -> int | None:
        """The number of the argument ``closure`` of ``step``, ``self`` counted."""

    def check(self) -> None:
        """Raise where they cannot have their param groups cut."""

    def ended(self) -> None:
        """Note that a step was done."""


@dataclass
class _Swap:
    """A list of param groups: what is in it during a step, and what outside."""

    groups: list[Group]
    inside: list[Group]
    outside: list[Group]


@dataclass
class _Level:
    """A call of ``step`` inside of which the optimizer's own code runs."""

    optimizer: Any
    frame: FrameType
    """Of the function that runs it, which tells a step under way from one that ended by an exception."""
    has_decayed: bool = False
    """Whether what is decayed element by element was."""


@dataclass
class _Step:
    """A step under way."""

    levels: list[_Level]
    """Calls of ``step`` inside each other."""
    begun: set[int] | None
    """The param groups, by id, that it is a new step of; None for all."""
    version: int | None
    """Of the parameters, where their change tells a step."""
    thread: int = field(default_factory=threading.get_ident)
    swaps: list[_Swap] = field(default_factory=list)
    is_cut: bool = False
    is_written_back: bool = True
    done: list[Any] = field(default_factory=list)
    """Optimizers whose own step has ended, wrappers aside."""
    counts: list[tuple[Group, int]] = field(default_factory=list)
    """What is counted at its end."""
    is_watched: bool = False
    """Whether somebody has looked on since its gradients are there."""
    lent: list[Lent] = field(default_factory=list)
    """Gradients that stand in the place of others."""

    def has_decayed(self, optimizer: Any) -> bool:
        """Whether an optimizer has decayed in this step of its what is decayed element by element."""
        return any(level.has_decayed for level in self.levels if level.optimizer is optimizer)


class _Entry(NamedTuple):
    """How things stood when our layer was entered."""

    step: _Step | None
    depth: int
    is_cut: bool


class Stepping:
    """The steps of optimizers that share their param groups.

    Args:
        room: the optimizers.
    """

    def __init__(self, room: Room) -> None:
        self.room = room
        self._step: _Step | None = None
        self._layers = 0
        """Calls of our layer that are running, each of which leaves nothing behind."""
        self._is_paused = False
        self._rehearses: Any = None
        """The optimizer that makes a step which moves nothing."""
        self._turns: dict[int, set[int]] = {}
        """For each param group the first parameters of calls that make up a step of DeepSpeed's."""

    # Hooks of an optimizer, and what our layer calls in their place.

    def first(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """The first step pre-hook: hooks of others come next."""
        self.go_out()

    def before(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The last step pre-hook: the code of the optimizer comes next."""
        if not self.room.is_armed or self.room.fit_is_over():
            return None
        self.begin(optimizer, caller_of(Stepping.before))
        return self.with_closure_outside(self.room.place_of_closure(optimizer), args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of a step that the user has compiled
    def _let_watch(self, step: _Step | None) -> None:
        if step is not None and not step.is_watched and self.room.watchers:
            step.is_watched = True
            for watcher in self.room.watchers:
                watcher.before(step.levels[0].optimizer)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # likewise
    def _gradients_are_there(self, step: _Step | None) -> None:
        """The code of an optimizer goes on with the gradients that there are."""
        self._let_watch(step)
        optimizer: Any = step.levels[-1].optimizer if step is not None and step.levels else None
        if step is None or not self.room.is_leaf(optimizer) or step.has_decayed(optimizer):
            return
        parts = self.room.parting.by_element(optimizer.param_groups)
        if not parts:
            return
        for level in step.levels:
            level.has_decayed |= level.optimizer is optimizer
        if not is_skipped(optimizer):
            decay_parts(optimizer, parts, self.room.parting.starts, step.lent)

    def after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """The first step post-hook: hooks of others come next."""
        self.end(optimizer, caller_of(Stepping.after))

    def last(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """The last step post-hook: the code of an optimizer around this one comes next."""
        self.go_in()

    def enter(self) -> _Entry:
        """Enter our layer; what :meth:`leave` is to be called with, whatever happens meanwhile."""
        self.mend()
        self._layers += 1
        step = self._step
        return _Entry(None, 0, False) if step is None else _Entry(step, len(step.levels), step.is_cut)

    def leave(self, entry: _Entry) -> None:
        """Leave our layer: all is as it was when it was entered."""
        self._layers -= 1
        step = entry.step
        if step is None:
            if self._step is not None:
                self._drop(self._step)
        elif len(step.levels) > entry.depth or self._step is not step or step.is_cut != entry.is_cut:  # by an exception
            del step.levels[entry.depth :]
            self._step = step
            self._go_on(step) if entry.is_cut else self._take_out(step)

    def begin(self, optimizer: Any, frame: FrameType) -> None:
        """Put the rules in force: the code of the optimizer is about to run.

        Args:
            optimizer: one of the room.
            frame: of the function that runs it.
        """
        self.mend()
        level = _Level(optimizer, frame)
        if self._step is not None:
            self._step.levels.append(level)
            self._go_on(self._step)
            return
        if is_rehearsal(optimizer.param_groups):  # which moves nothing, before the length of the run is known
            _allow_states_without_counts(optimizer.param_groups)
            self._rehearses = optimizer
            return
        begun = self._begun(optimizer) if is_called_by_deepspeed() else None
        if begun is not None and self.room.parting.asks_for_elements:
            raise RuntimeError(UNDER_DEEPSPEED)
        step = _Step([level], begun, self._version(optimizer))
        parting, lists = self.room.parting, shared_lists(self.room.members)
        parting.begin(lists, begun)  # all is made, and may fail, before anything moves
        self._check()
        step.swaps = [_Swap(groups, self._inside(groups), list(groups)) for groups in lists]
        self._step = step
        for watcher in () if self.room.is_leaf(optimizer) else self.room.watchers:
            watcher.begin(optimizer)
        _move_in(step)

    def end(self, optimizer: Any, frame: FrameType) -> None:
        """Put the rules out of force: the code of the optimizer has run."""
        step = self._step
        if step is None:
            is_over, self._rehearses = self._rehearses is optimizer, None
            if is_over and not _is_state_without(START_KEY) and self.room.starts_in_checkpoint():
                self.room.parting.starts.rehearse(optimizer, self.room.parting.with_starts(optimizer.param_groups))
            return
        by_element = self.room.parting.by_element(optimizer.param_groups) if self.room.is_leaf(optimizer) else []
        is_missed = bool(by_element) and not step.has_decayed(optimizer)
        self._take_out(step)
        depths = [depth for depth, level in enumerate(step.levels) if level.frame is frame]
        del step.levels[depths[-1] if depths else -1 :]
        if all(level.optimizer is not optimizer for level in step.levels):
            _give_back(step, is_done=True)
        if self.room.is_leaf(optimizer) and not is_skipped(optimizer):
            step.done.append(optimizer)
            self.room.parting.starts.keep(optimizer)
        if is_missed:
            raise RuntimeError(
                f"{type(optimizer).__name__} has stepped without calling its closure, so rows, blocks and starts of "
                "decay rules were not in force in it"
            )
        if not step.levels:
            step.counts = self._counts(step, optimizer)
            self._drop(step)
            for watcher in self.room.watchers if step.is_watched else ():
                watcher.after(optimizer)
            self.room.ended()

    def go_out(self) -> None:
        """Put the rules out of force for hooks of others, inside of a step."""
        if self._step is not None:
            self.mend()
            if self._step is not None:
                self._take_out(self._step)

    def go_in(self) -> None:
        """Put the rules in force again, inside of a step."""
        if self._step is not None:
            self._go_on(self._step)

    def with_closure_outside(
        self, place: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of ``step`` with a closure that sees what is outside.

        Args:
            place: the number of the argument ``closure``, None for a ``step`` without.
            args: those without names.
            kwargs: those with names.
        """
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self.outside(kwargs["closure"])}
        if place is not None and place < len(args) and callable(args[place]):
            return (*args[:place], self.outside(args[place]), *args[place + 1 :]), kwargs
        self._gradients_are_there(self._step)
        return args, kwargs

    def outside(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """A closure that sees what is outside."""

        @functools.wraps(closure, updated=())
        def outside(*args: Any, **kwargs: Any) -> Any:
            step = self._step
            if step is None:
                return closure(*args, **kwargs)
            optimizer = step.levels[-1].optimizer if step.levels else None
            if step.has_decayed(optimizer):
                raise RuntimeError(
                    f"{type(optimizer).__name__} calls its closure several times in a step, so rows, blocks and starts "
                    "of decay rules cannot be in force in it"
                )
            self._take_out(step)
            self._step = None
            try:
                result = closure(*args, **kwargs)
            except BaseException:
                if self._layers:  # which clean up, should nobody catch it
                    self._step = step
                    self._go_on(step)
                raise
            self._step = step
            self._go_on(step)
            self._gradients_are_there(step)
            return result

        return outside

    # Called from anywhere.

    @property
    def is_cut(self) -> bool:
        """Whether the rules are in force at this moment."""
        return self._step is not None and self._step.is_cut

    def pause(self, *_: Any) -> None:
        """The hook before a state is saved or loaded: rules out of force until :meth:`resume`, should that come."""
        self.mend()
        step = self._step
        if step is None:
            return
        if step.thread != threading.get_ident():
            _wait_while(lambda: self._step is step)  # the step of another thread, whose end is near
        elif step.is_cut:
            self._take_out(step)
            self._is_paused = True

    def resume(self, *_: Any) -> None:
        """The hook after that: rules in force where they were."""
        is_paused, self._is_paused = self._is_paused, False
        if is_paused and self._step is not None:
            self._go_on(self._step)

    def mend(self) -> None:
        """Put back what a step left behind that ended by an exception, called past our layer."""
        step = self._step
        if step is None:
            return
        levels = [level for level in step.levels if is_running(level.frame)]
        if levels:
            step.levels = levels
        elif step.thread == threading.get_ident() or not is_alive(step.thread):
            self._drop(step)

    def theirs(self, groups: list[Group]) -> list[Group]:
        """The param groups of a list as they are outside of a step. Nothing is changed."""
        return list(groups) if self._step is None else self._back(groups)

    # The parts of these.

    def _go_on(self, step: _Step) -> None:
        """Put the rules in force again, with what was set meanwhile."""
        if step.is_cut:
            return
        lists = [swap.groups for swap in step.swaps]
        lists += [groups for groups in shared_lists(self.room.members) if all(groups is not one for one in lists)]
        self.room.parting.go_on([group for groups in lists for group in groups])
        self._check()
        before = {id(swap.groups): swap for swap in step.swaps}
        step.swaps = [self._swap(groups, before.get(id(groups))) for groups in lists]
        _move_in(step)

    def _swap(self, groups: list[Group], before: _Swap | None) -> _Swap:
        inside = self._inside(groups)
        if before is not None and _same(groups, before.outside):
            known = {id(group) for group in inside}
            if all(id(group) in known for group in before.inside):
                inside = before.inside  # of a list of its own, the optimizer may have chosen some parts only
        return _Swap(groups, inside, list(groups))

    def _take_out(self, step: _Step) -> None:
        """Put the rules out of force: the lists first, then what was written into the parts."""
        if not step.is_cut:
            return
        for swap in step.swaps:
            if _same(swap.groups, swap.inside):
                swap.groups[:] = swap.outside
            else:
                swap.inside, swap.outside = list(swap.groups), self._back(swap.groups)
                swap.groups[:] = swap.outside
        for groups in shared_lists(self.room.members):
            if all(groups is not swap.groups for swap in step.swaps):  # one that the optimizer has put in its place
                step.swaps.append(_Swap(groups, list(groups), self._back(groups)))
                groups[:] = step.swaps[-1].outside
        step.is_cut = False
        self._write_back(step)

    def _write_back(self, step: _Step) -> None:
        """Put what was written into the parts into the param groups, unless that is done."""
        if not step.is_written_back:
            self.room.parting.write_back()
            step.is_written_back = True

    def _drop(self, step: _Step) -> None:
        """End a step; again, if it was interrupted here."""
        self._take_out(step)
        self._write_back(step)
        _give_back(step, is_done=False)
        self.room.parting.starts.forget_new()
        self.room.parting.set_counts(step.counts)
        self._step = None

    def _inside(self, groups: list[Group]) -> list[Group]:
        inside = self.room.parting.inside
        return [part for group in groups for part in inside(group)]

    def _back(self, groups: list[Group]) -> list[Group]:
        """A list of param groups as it is outside: each once for all its parts; what came meanwhile stays."""
        owners = self.room.parting.owners()
        back = {id(group): group for group in (owners.get(id(one), one) for one in groups)}
        return list(back.values())

    def _check(self) -> None:
        if self.room.parting.is_cut_anew:
            self.room.check()
            self.room.parting.is_cut_anew = False

    def _counts(self, step: _Step, optimizer: Any) -> list[tuple[Group, int]]:
        """The counts of param groups whose optimizers have done a step of the training."""
        done = step.done
        if not done and step.version != self._version(optimizer):  # a wrapper that has moved the weights by itself
            done = [optimizer]
        groups = {id(group): group for one in done for group in one.param_groups}
        return self.room.parting.counts(g for key, g in groups.items() if step.begun is None or key in step.begun)

    def _version(self, optimizer: Any) -> int | None:
        """A number that changes with the parameters, for an optimizer that leaves the step to others."""
        if self.room.is_leaf(optimizer):
            return None
        return version_of(parameter for group in optimizer.param_groups for parameter in group["params"])

    def _begun(self, optimizer: Any) -> set[int]:
        """The param groups, by id, of which a call of DeepSpeed's (0.19) is the first one of a step.

        ZeRO 1 and 2 make a call for each group, ZeRO-3 for each part of a group. Each part has another first parameter,
        so the next step of a group begins where one had its turn already.
        """
        begun = set()
        for group in optimizer.param_groups:
            if group["params"]:
                turns, first = self._turns.setdefault(id(group), set()), id(group["params"][0])
                if not turns or first in turns:
                    turns.clear()
                    begun.add(id(group))
                turns.add(first)
        return begun


def _give_back(step: _Step, *, is_done: bool) -> None:
    while step.lent:
        step.lent.pop().give_back(is_done)


def _move_in(step: _Step) -> None:
    step.is_written_back, step.is_cut = False, True
    for swap in step.swaps:
        if not _same(swap.inside, swap.groups):
            swap.groups[:] = swap.inside


def _allow_states_without_counts(groups: list[Group]) -> None:
    """Leave out the count of steps where a flattened state is to be loaded, which torch asks for all keys of groups."""
    if _is_state_without(STEP_KEY):
        for group in groups:
            group.pop(STEP_KEY, None)


def _is_state_without(key: str) -> bool:
    """Whether a flattened state is to be loaded that has nothing under a key."""
    state = flat_state_to_load()
    return state is not None and not any(str(name).endswith(f".{key}") for name in state)


def _wait_while(condition: Callable[[], bool]) -> None:
    waited = 0.0
    while condition() and waited < _LONGEST_STEP:
        time.sleep(_TICK)
        waited += _TICK


def _same(a: list[Group], b: list[Group]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))
