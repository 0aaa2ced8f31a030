"""The one place that touches an optimizer of others: what hangs on it while rules are in force, and how it comes off.

An optimizer steps over ``param_groups``. Its last step pre-hook puts the rules in force there and its first step
post-hook takes them out (``stepping`` does the work), as hooks act also where the step of the class is called. A thin
``step`` on the instance keeps the hooks in that order, sees that an exception leaves nothing behind, and does their
work for a class that has none.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_regdecay.optim.copies import REDUCE, end_refusal, has_hooks, reduce_for_copy
from lightning_regdecay.optim.holders import numbered_by_group, shared_lists, with_held
from lightning_regdecay.optim.parting import Parting
from lightning_regdecay.optim.seen import Group
from lightning_regdecay.optim.stepping import Stepping, Watcher
from lightning_regdecay.rules.schedules import STEP_KEY

_PRE, _POST = "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"
_MARKS = ("_wrapped_by_lr_sched",)
"""What torch's lr schedulers (2.6 to 2.13) put on ``step``, and look for later. Such a ``step`` calls that of the
class, with its hooks."""


@dataclass(eq=False)
class _Hung:
    """What hangs on one optimizer."""

    optimizer: weakref.ref[Any]
    layer: weakref.ref[Any] | None = None
    """Our ``step`` on the instance."""
    under: Any = None
    """What was there before, None for the step of the class."""
    steps: list[Any] = field(default_factory=list)
    """The handles of four hooks: before those of others, after them; and the same after the step."""
    states: list[Any] = field(default_factory=list)
    """The handles of hooks around states that are saved or loaded."""
    is_hung: bool = False
    is_leaf: bool = True
    place_of_closure: int | None = None


class StepRoom:
    """Rules in force inside the steps of an optimizer, or of several that step over the same param groups.

    Args:
        members: the optimizers, which are not kept alive.
        parting: tells what is to be stepped over.
        loaded: is called with an optimizer after it has loaded a state.
        check: raises where the optimizers cannot have their param groups cut.
        news: is called with the room after a step that parameters came to.
    """

    def __init__(
        self,
        members: list[Any],
        parting: Parting,
        loaded: Callable[[Any], None],
        check: Callable[[StepRoom], None],
        news: Callable[[StepRoom], None],
    ) -> None:
        self.parting = parting
        self.watchers: list[Watcher] = []
        """Look on while the optimizers step."""
        self.told: set[tuple[str, str]] = set()
        """What the user was told of."""
        self.is_armed = False
        self.fit_is_over: Callable[[], bool] = lambda: False
        """Tells whether the fit is over that has put the rules in force."""
        self.is_last_run: Callable[[], bool] = lambda: True
        """Once disarmed, tells whether nobody has stepped since, so that what was in force can still be told."""
        self.counts_in_checkpoint: Callable[[], bool] = lambda: True
        """Tells whether the checkpoint that is being loaded, should there be one, has counts of steps."""
        self.starts_in_checkpoint: Callable[[], bool] = lambda: True
        """Likewise, whether it has what weights decay toward."""
        self.steps_done = 0
        self.numbered: frozenset[str] | None = None
        """Attributes of the optimizers with an entry for each param group, when rules came for the first time."""
        self._loaded, self._check, self._news = loaded, check, news
        self._roots: list[weakref.ref[Any]] = []
        self._hung = [_Hung(weakref.ref(member)) for member in members]
        self._stepping: weakref.ref[Stepping] | None = None
        """Held by the optimizers: what goes on in a step is theirs, and ends with them."""

    @property
    def members(self) -> list[Any]:
        """The optimizers that are still there."""
        return [member for hung in self._hung if (member := hung.optimizer()) is not None]

    @property
    def roots(self) -> list[Any]:
        """The optimizers by which others step these."""
        return [root for reference in self._roots if (root := reference()) is not None]

    @property
    def stepping(self) -> Stepping | None:
        """What goes on in the steps, None where nothing can."""
        return None if self._stepping is None else self._stepping()

    @property
    def groups(self) -> list[Group]:
        """All their param groups, outside of a step."""
        return [group for groups in shared_lists(self.members) for group in self.theirs(groups)]

    def theirs(self, groups: list[Group]) -> list[Group]:
        """The param groups of a list as they are outside of a step."""
        stepping = self.stepping
        return list(groups) if stepping is None else stepping.theirs(groups)

    def add_root(self, optimizer: Any) -> None:
        """Note an optimizer by which others step these."""
        if all(optimizer is not root for root in self.roots):
            self._roots.append(weakref.ref(optimizer))

    # What a step asks.

    def is_leaf(self, optimizer: Any) -> bool:
        """Whether an optimizer steps by itself, and is no wrapper of another."""
        return all(hung.is_leaf for hung in self._hung if hung.optimizer() is optimizer)

    def place_of_closure(self, optimizer: Any) -> int | None:
        """The number of the argument ``closure`` of ``step``, ``self`` counted."""
        return next((hung.place_of_closure for hung in self._hung if hung.optimizer() is optimizer), None)

    def check(self) -> None:
        """Raise where the optimizers cannot have their param groups cut."""
        self._check(self)

    def ended(self) -> None:
        """Note that a step was done."""
        self.steps_done += 1
        if self.parting.has_news:
            self._news(self)

    def begin_run(self, steps_done: int) -> None:
        """Ask lengths and peaks anew, and have starts, as a run begins, or goes on.

        Args:
            steps_done: the steps of the run that were done before.
        """
        self.parting.begin_run(self.groups, 0 if steps_done == 0 else None)
        self.parting.starts.begin_run(self.members, self.parting.with_starts(self.groups), steps_done)

    def forget_starts(self) -> None:
        """Forget the starts that no rule asks for."""
        self.parting.starts.forget(self.parting.with_starts(self.groups), self.members)

    # Coming and going.

    def join(self, members: list[Any]) -> None:
        """Take in optimizers that step over the same param groups; they are hung onto with :meth:`arm`."""
        known = self.members
        self._hung += [_Hung(weakref.ref(one)) for one in members if all(one is not other for other in known)]

    def arm(self) -> None:
        """Hang onto the optimizers, once."""
        if self.numbered is None:
            self.numbered = frozenset(name for member in self.members for name in numbered_by_group(member))
        stepping = self.stepping or Stepping(self)
        self._stepping = weakref.ref(stepping)
        self.is_armed = True
        for hung in self._hung:
            if not hung.is_hung:
                self._hang(hung, stepping)

    def disarm(self) -> None:
        """Leave the optimizers as they were. A layer that others have wrapped stays, and does nothing."""
        if self.stepping is not None:
            self.stepping.mend()
        self.is_armed = False
        for hung in self._hung:
            _take_off(hung)

    def remembered(self) -> Callable[[], None]:
        """What makes the room and its optimizers as they are now."""
        hung, was_armed = list(self._hung), self.is_armed
        layers, given = list(self.parting.layers), self.parting.strengths.given
        before = [(group, dict(group)) for group in self.groups]

        def undo() -> None:
            for new in self._hung:
                if new not in hung:
                    _take_off(new)
            for group, values in before:
                group.clear()
                group.update(values)
            self._hung, self.parting.layers, self.parting.strengths.given = hung, layers, given
            self.parting.look_again()
            if was_armed:
                self.arm()
            else:
                self.disarm()

        return undo

    def _hang(self, hung: _Hung, stepping: Stepping) -> None:
        optimizer = hung.optimizer()
        if optimizer is None:
            return
        end_refusal(optimizer)
        own = vars(optimizer)
        hung.is_hung, hung.is_leaf = True, len(with_held(optimizer)) == 1
        hung.place_of_closure = _place_of_closure(type(optimizer).step)
        own[REDUCE] = functools.partial(
            reduce_for_copy,
            hung.optimizer,
            functools.partial(_changes, weakref.ref(self)),
            functools.partial(_without_ours, hung, stepping),
        )
        if hung.layer is None or hung.layer() is None:
            hung.under = own.get("step")
            own["step"] = _layer(hung, stepping)
            hung.layer = weakref.ref(own["step"])
        if isinstance(own.get(_PRE), OrderedDict):
            # Not to be compiled with the step: their values would be constants, and each step be compiled anew.
            hung.steps = [
                optimizer.register_step_pre_hook(_eager(stepping.first)),
                optimizer.register_step_pre_hook(_eager(stepping.before)),
                optimizer.register_step_post_hook(_eager(stepping.after)),
                optimizer.register_step_post_hook(_eager(stepping.last)),
            ]
        if "_optimizer_load_state_dict_post_hooks" in own:
            hung.states = [
                optimizer.register_state_dict_pre_hook(stepping.pause),
                optimizer.register_state_dict_post_hook(stepping.resume),
                optimizer.register_state_dict_post_hook(functools.partial(_leave_out_counts, weakref.ref(self))),
                optimizer.register_load_state_dict_pre_hook(stepping.pause),
                optimizer.register_load_state_dict_pre_hook(functools.partial(_note_starts, weakref.ref(self))),
                optimizer.register_load_state_dict_post_hook(self._loaded),
                optimizer.register_load_state_dict_post_hook(stepping.resume),
            ]


def _take_off(hung: _Hung) -> None:
    for handle in hung.steps + hung.states:
        handle.remove()
    optimizer = hung.optimizer()
    own = {} if optimizer is None else vars(optimizer)
    if hung.is_hung and getattr(own.get(REDUCE), "func", None) is reduce_for_copy:
        del own[REDUCE]
    hung.steps, hung.states, hung.is_hung = [], [], False
    layer = None if hung.layer is None else hung.layer()
    if layer is not None and own.get("step") is layer:
        del own["step"]
        if hung.under is not None:
            own["step"] = hung.under
        hung.layer = hung.under = None


def _layer(hung: _Hung, stepping: Stepping) -> Any:
    """The ``step`` of the instance: bound, as lr schedulers want it, but not to a strong reference."""
    reference, under = hung.optimizer, hung.under
    cls: Any = type(reference())
    in_order, enter, leave = _eager(_keep_in_order), _eager(stepping.enter), _eager(stepping.leave)
    by_layer = _eager(_step_by_layer)

    def step(_: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer: Any = reference()
        if optimizer is None:
            raise ReferenceError(f"this is the step of a {cls.__name__} that is no more; keep the optimizer")
        hooks_act = in_order(hung, stepping.room)
        entry = enter()
        try:
            if not hooks_act:
                return by_layer(hung, stepping, args, kwargs)
            return type(optimizer).step(optimizer, *args, **kwargs) if under is None else under(*args, **kwargs)
        finally:
            leave(entry)

    functools.update_wrapper(step, cls.step, updated=())
    vars(step).update({mark: getattr(under, mark) for mark in _MARKS if hasattr(under, mark)})
    return types.MethodType(step, weakref.proxy(reference()))


def _step_by_layer(hung: _Hung, stepping: Stepping, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A step with the rules in force, where no hooks act."""
    optimizer: Any = hung.optimizer()
    under = hung.under
    step, given = (type(optimizer).step, (optimizer, *args)) if under is None else (under, args)
    frame = sys._getframe()
    stepping.begin(optimizer, frame)
    given, kwargs = stepping.with_closure_outside(_place_of_closure(step), given, kwargs)
    result = step(*given, **kwargs)
    stepping.end(optimizer, frame)
    stepping.go_in()
    return result


def _keep_in_order(hung: _Hung, room: Any) -> bool:
    """Have hooks of others between ours; False where ours are to act, and will not."""
    if room.is_armed and room.fit_is_over():
        room.disarm()  # a fit that ended with nobody told, as that of a learning rate finder that failed
    if not room.is_armed:
        return True
    optimizer: Any = hung.optimizer()
    if not hung.steps or not has_hooks(type(optimizer)):
        return False
    if hung.under is not None and not any(hasattr(hung.under, mark) for mark in _MARKS):
        return False  # nothing is known of a step that others have put there
    before: Any = getattr(optimizer, _PRE, {})
    after: Any = getattr(optimizer, _POST, {})
    ours = [handle.id for handle in hung.steps]
    if not all(key in hooks for key, hooks in zip(ours, (before, before, after, after))):
        return False
    for hooks, (first, last) in ((before, ours[:2]), (after, ours[2:])):
        if next(iter(hooks)) != first:
            hooks.move_to_end(first, last=False)
        if next(reversed(hooks)) != last:
            hooks.move_to_end(last)
    return True


def _without_ours(hung: _Hung, stepping: Stepping, state: dict[str, Any]) -> dict[str, Any]:
    """The attributes of an optimizer without what hangs on it, as they are outside of a step."""
    ours = {handle.id for handle in hung.steps + hung.states}
    found = {}
    for name, value in state.items():
        if name == "step" and hung.layer is not None and value is hung.layer():
            if hung.under is not None:
                found[name] = hung.under
        elif isinstance(value, OrderedDict) and name.startswith("_optimizer_"):
            found[name] = OrderedDict((key, hook) for key, hook in value.items() if key not in ours)
        elif name == "param_groups" and stepping.is_cut:
            found[name] = stepping.theirs(value)
        else:
            found[name] = value
    return found


def _note_starts(reference: weakref.ref[StepRoom], _: Any, state: dict[str, Any]) -> None:
    room = reference()
    if room is not None:
        room.parting.starts.note_loading(state)


def _leave_out_counts(reference: weakref.ref[StepRoom], _: Any, state: dict[str, Any]) -> None:
    """Leave the counts of steps out of a state that is made to load a checkpoint into, which has none.

    ``torch.distributed.checkpoint`` (2.6 to 2.13) asks a checkpoint for all that such a state has.
    """
    room = reference()
    if room is not None and not room.counts_in_checkpoint():
        for group in state["param_groups"]:
            group.pop(STEP_KEY, None)


def _changes(reference: weakref.ref[StepRoom]) -> bool:
    room = reference()
    return room is not None and room.parting.changes(room.groups)


def _eager(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compiler.disable(function)  # type: ignore[no-untyped-call,no-any-return]


def _place_of_closure(step: Callable[..., Any]) -> int | None:
    try:
        names = list(inspect.signature(step).parameters)
    except (TypeError, ValueError):  # of what is written in C nothing is known
        return None
    return names.index("closure") if "closure" in names else None
