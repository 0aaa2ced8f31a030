"""Rules put in force in an optimizer, what is in force there, and its end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities import rank_zero_warn
from torch import nn

from lightning_regdecay.groups.groups import NAMES_KEY, DecayGroups, build_decay_groups
from lightning_regdecay.groups.parameters import without_wrappers
from lightning_regdecay.groups.places import Places
from lightning_regdecay.optim.checks import check_family, check_room, check_starts, warn_of_strays
from lightning_regdecay.optim.decoupling import check_decoupled
from lightning_regdecay.optim.holders import check_is_optimizer, families, innermost, unwrapped, with_held
from lightning_regdecay.optim.layers import Layer, built_options, is_own
from lightning_regdecay.optim.parting import Parting
from lightning_regdecay.optim.registry import Registry
from lightning_regdecay.optim.starts import Starts
from lightning_regdecay.optim.step_room import StepRoom
from lightning_regdecay.optim.stepping import Watcher
from lightning_regdecay.optim.strengths import TELLS_NO_STEPS, lengths
from lightning_regdecay.optim.telling import InForce, ParamGroupsInForce, told
from lightning_regdecay.rules.crossing import RuleSet
from lightning_regdecay.rules.forms import DecayRules, LrRules
from lightning_regdecay.rules.schedules import schedule_of

_rooms: Registry[StepRoom] = Registry()
"""The room of each optimizer. Rooms hold no optimizer, and no model."""


def apply_decay_rules(
    optimizer: Any,
    module: nn.Module,
    rules: DecayRules,
    *,
    lr_rules: LrRules | None = None,
    strict: bool = True,
    total_steps: float | None = None,
    steps_per_epoch: float | None = None,
) -> None:
    """Put decay rules in force in any optimizer, whoever built it and whoever steps it.

    Its param groups stay as they are, for everybody to steer and for checkpoints; inside of each step, every parameter
    has the λ of its rule. Rules set λ there, and a factor on the lr. A second call for the same model puts its rules in
    the place of the first ones; call it also when a model has grown by parameters that the optimizer had before.

    Args:
        optimizer: of torch's interface; also what ``Fabric.setup`` and ``LightningModule.optimizers()`` return, and an
            optimizer around others.
        module: the model.
        rules: see :class:`~lightning_regdecay.DecayRule` for what they may be.
        lr_rules: see :class:`~lightning_regdecay.LrRule`; in an optimizer that is not built over the decay groups,
            those with ``lr_mult``.
        strict: False makes rules that take nothing a warning.
        total_steps: the optimizer steps of the whole run, for schedules without a length of their own.
        steps_per_epoch: the optimizer steps of an epoch, for lengths and delays in epochs.

    Raises:
        TypeError: for rules of an unknown form, a module that is none, and what is no optimizer.
        ValueError: for rules that do not fit the model, options other than λ and a factor on the lr, an optimizer that
            has no parameter of the model or knows no weight decay, and one whose steps cannot be changed in this way.
            Nothing is changed then.

    >>> import torch
    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    >>> apply_decay_rules(optimizer, model, {"bias": 0.0, "*": {"decay_mult": 0.5}})
    >>> [(group["name"], group["weight_decay"]) for group in groups_in_force(optimizer)]
    [('rest', 0.05), ('bias', 0.0)]
    >>> len(optimizer.param_groups)
    1
    """
    _check_optimizer(optimizer)
    given = lengths(total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    groups = build_decay_groups(module, rules, lr_rules=lr_rules, strict=strict)
    for room in put_in_force([optimizer], module, groups, by_user=True):
        room.parting.strengths.give(given)


def schedule_weight_decay(
    optimizer: Any, *, total_steps: float | None = None, steps_per_epoch: float | None = None
) -> None:
    """Keep the λ of every param group that has a schedule on it, at each step of an optimizer.

    The mixin, the callback and :func:`apply_decay_rules` do it by themselves. Call it for an optimizer that you built
    over ``group.as_param_group()`` of decay groups, after its lr scheduler is made; and to give lengths that no Trainer
    knows. The steps are counted in the param groups, so they go on from any checkpoint that
    ``optimizer.load_state_dict`` takes. A second call changes the lengths.

    Args:
        optimizer: over param groups with schedules, or with decay rules in force.
        total_steps: the optimizer steps of the whole run, for schedules without a length of their own.
        steps_per_epoch: the optimizer steps of an epoch, for lengths and delays in epochs.

    Raises:
        TypeError: for what is no optimizer.
        ValueError: where a schedule needs one of these and it is not given; for a ``timescale`` or ``per_step`` with an
            optimizer that is coupled, or not known to be decoupled; for an lr of 0 at its peak. Nothing is changed
            then.

    >>> import torch
    >>> from lightning_regdecay import DecaySchedule
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> decay = DecaySchedule("linear", 0.5, 0.0).as_dict()
    >>> optimizer = torch.optim.AdamW([{"params": [weight], "weight_decay": 0.5, "decay_schedule": decay}])
    >>> schedule_weight_decay(optimizer, total_steps=4)
    >>> for _ in range(4):
    ...     optimizer.step()
    ...     print(optimizer.param_groups[0]["weight_decay"])
    0.5
    0.375
    0.25
    0.125
    """
    _check_optimizer(optimizer)
    given = lengths(total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    plans = [_Plan(unwrapped(optimizer), family, _rooms_of_family(family)) for family in families(unwrapped(optimizer))]
    for plan in plans:
        for group in [group for member in plan.family for group in member.param_groups]:
            schedule = schedule_of(group)
            kind = None if schedule is None else schedule.of_lr_times_lambda
            if kind is not None:
                check_decoupled(innermost(plan.family, group), group, str(group.get("name")), kind)

    def follow(room: StepRoom, plan: _Plan) -> None:
        room.parting.strengths.give(given)
        room.parting.refresh(room.groups)

    _carry_out(plans, follow)


def groups_in_force(optimizer: Any) -> list[dict[str, Any]]:
    """The param groups as an optimizer steps over them.

    Args:
        optimizer: with decay rules or without; of what Fabric and Lightning put around it, the one inside.

    Returns:
        Dictionaries with all that the optimizer's own have (``params``, ``lr``, ``weight_decay``, …), and ``name`` and
        ``param_names``; with parts of tensors, ``params`` are the tensors, and ``regions`` tells which part of each;
        ``toward`` is ``"start"`` or ``"given"`` for a group that decays toward weights.
        The list prints as a table. To be read: who sets something sets it in ``optimizer.param_groups``.

    Raises:
        TypeError: for what is no optimizer.

    >>> import torch
    >>> optimizer = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1)
    >>> [sorted(group)[-1] for group in groups_in_force(optimizer)]
    ['weight_decay']
    """
    check_is_optimizer(optimizer)
    return ParamGroupsInForce(in_force(optimizer))


def watch(optimizers: Iterable[Any], watcher: Watcher, is_over: Callable[[], bool]) -> Callable[[], None]:
    """Have somebody look on while optimizers step, with rules in force or without.

    Args:
        optimizers: the optimizers.
        watcher: is called around each step.
        is_over: tells whether the fit is over, also where nobody has ended the watch.

    Returns:
        What ends it.
    """
    plans = []
    for root in map(unwrapped, optimizers):
        _check_optimizer(root)
        plans += [_Plan(root, family, _rooms_of_family(family)) for family in families(root)]

    def look_on(room: StepRoom, plan: _Plan) -> None:
        if not room.is_armed:
            room.fit_is_over = is_over
        if all(one is not watcher for one in room.watchers):
            room.watchers.append(watcher)

    rooms = _carry_out(plans, look_on)

    def end() -> None:
        for room in rooms:
            room.watchers = [one for one in room.watchers if one is not watcher]
            if not room.watchers and not room.parting.layers and not room.parting.changes(room.groups):
                room.disarm()

    return end


def in_force(optimizer: Any) -> list[InForce]:
    """As :func:`groups_in_force`, with what else is known of each group."""
    optimizer = unwrapped(optimizer)
    room = room_of(optimizer)
    if room is None:
        return told(Parting(), optimizer.param_groups)
    groups = room.theirs(optimizer.param_groups)
    return told(room.parting if room.is_armed or room.is_last_run() else Parting(), groups, with_held(optimizer))


def refresh(optimizer: Any) -> None:
    """Set the λ of the next step in every param group that has a schedule itself.

    Raises:
        RuntimeError: where param groups have schedules that nobody follows.
        ValueError: where a length that is needed is not known.
    """
    rooms = [room for room in rooms_of([optimizer]) if room.is_armed]
    for room in rooms:
        room.parting.refresh(room.groups)
    if not rooms and any(schedule_of(group) is not None for group in optimizer.param_groups):
        raise RuntimeError(
            f"{type(optimizer).__name__} has param groups with schedules of the weight decay, which nobody follows; "
            "call lightning_regdecay.schedule_weight_decay(optimizer, ...) where it is built"
        )


def own_strengths(optimizer: Any) -> dict[str, Any]:
    """λ that rules have set in param groups of an optimizer that were built as decay groups, by their names."""
    room = room_of(optimizer)
    return {} if room is None else {name: value for layer in room.parting.layers for name, value in layer.own.items()}


def room_of(optimizer: Any) -> StepRoom | None:
    """The room of an optimizer, or of the one inside it that steps; None without one."""
    return next((room for one in with_held(optimizer) if (room := _rooms.get(one)) is not None), None)


def rooms_of(optimizers: Iterable[Any]) -> list[StepRoom]:
    """The rooms of optimizers and of all that they hold, each once."""
    return _each_once(room for o in optimizers for one in with_held(o) if (room := _rooms.get(one)) is not None)


@dataclass
class _Plan:
    """What is to be done to optimizers that step over the same param groups."""

    root: Any
    """By which others step them."""
    family: list[Any]
    rooms: list[StepRoom]
    """Those that they have."""
    is_known: bool = True
    """Whether they have parameters that rules are known for."""


def put_in_force(
    optimizers: Iterable[Any],
    module: nn.Module,
    groups: DecayGroups,
    *,
    by_user: bool = False,
    all_of_them: bool = False,
) -> list[StepRoom]:
    """Put the rules of decay groups in force in the steps of optimizers: in all, or by an error in none.

    Args:
        optimizers: those of a model.
        module: the model.
        groups: its decay groups.
        by_user: whether the user does so, not the class of the model or a fit.
        all_of_them: also in those that have no parameter of the model yet.

    Returns:
        The rooms of the optimizers, and of those inside them.

    Raises:
        ValueError: see :func:`apply_decay_rules`.
    """
    module = without_wrappers(module)
    optimizers = list(optimizers)
    places = Places(module, groups)
    finds = places.find(groups)
    plans = []
    for root in map(unwrapped, optimizers):
        for family in families(root):
            every = [group for one in family for group in one.param_groups]
            is_known = any(is_own(group, places) or any(id(p) in finds for p in group["params"]) for group in every)
            plans.append(_Plan(root, family, _rooms_of_family(family), is_known))
    known = [plan for plan in plans if plan.is_known]
    if not known and groups.rule_set:
        # Lightning (2.5 to 2.6) puts a mock in the place of None.
        kinds = {type(plan.root).__name__ for plan in plans} - {"_MockOptimizer"}
        why = f"{', '.join(sorted(kinds))} has none of its parameters" if kinds else "it has no optimizer"
        raise ValueError(
            f"the decay rules of {type(module).__name__} are in force nowhere: {why}; give it an optimizer over its "
            "parameters (with Lightning, let configure_optimizers return one over self.parameters())"
        )
    given = Starts()
    for plan in known:
        check_family(plan.family, plan.rooms, places, finds)
        check_starts(plan.root, finds, given)

    def rule(room: StepRoom, plan: _Plan) -> None:
        layers = room.parting.layers if room.is_armed else []
        others = [layer for layer in layers if layer.places.module() not in (None, module)]
        own = room.parting.own_strengths(room.groups, places)
        built = {str(g.get("name")): built_options(g, layers, places) for g in room.groups if NAMES_KEY in g}
        room.parting.layers = [*others, Layer(places, own, by_user, built)]
        room.parting.take_up_rules(room.groups, room.parting.find() if others else finds)
        room.parting.starts.take_given(given, (p for group in room.groups for p in group["params"]))

    rooms = _carry_out(plans if all_of_them else known, rule)
    for room in rooms:
        room.forget_starts()
    return rooms


def _carry_out(plans: list[_Plan], act: Callable[[StepRoom, _Plan], None]) -> list[StepRoom]:
    """Do something in the rooms of optimizers, and have these armed: in all, or by an error in none."""
    done: list[Callable[[], None]] = []
    rooms = []
    try:
        for plan in plans:
            room = plan.rooms[0] if plan.rooms else _new_room(plan.family)
            done += [one.remembered() for one in plan.rooms or [room]]
            for other in plan.rooms[1:]:
                members = other.members
                other.disarm()
                room.parting.absorb(other.parting)
                plan.family += [one for one in members if all(one is not member for member in plan.family)]
            room.join(plan.family)
            act(room, plan)
            room.arm()
            room.add_root(plan.root)
            rooms.append(room)
        for room in rooms:
            for member in room.members:
                _rooms.set(member, room)
    except BaseException:
        for undo in reversed(done):
            undo()
        raise
    return _each_once(rooms)


def rooms_in_force(optimizers: Iterable[Any], module: nn.Module, rules: RuleSet) -> list[StepRoom] | None:
    """The rooms of optimizers, where some rules of a model are in force in all of them; None where not.

    Args:
        optimizers: those of a model.
        module: the model.
        rules: in force, or to be put in force.

    Raises:
        ValueError: where the user has put other rules in force for the model.
    """
    rooms = []
    for optimizer in optimizers:
        for family in families(unwrapped(optimizer)):
            known = [room for room in _rooms_of_family(family) if room.is_armed]
            layers = [layer for room in known if (layer := _layer_of(room, module)) is not None]
            if not layers:
                return None
            if layers[0].places.rules != rules:
                if layers[0].by_user:
                    raise ValueError(
                        f"apply_decay_rules has put rules in force for {type(module).__name__} in its "
                        f"{type(family[0]).__name__}, and other rules come by its class, its hyperparameters or "
                        "WeightDecayRules; put all rules into one place"
                    )
                return None
            rooms += known
    return _each_once(rooms) or None


def has_members(optimizers: Iterable[Any], module: nn.Module) -> bool:
    """Whether optimizers have parameters of a module."""
    own = {id(parameter) for parameter in module.parameters()}
    every = [group for optimizer in optimizers for group in optimizer.param_groups]
    return any(id(parameter) in own for group in every for parameter in group["params"])


def armed_for(module: nn.Module) -> list[StepRoom]:
    """The rooms in which rules of a model are in force now."""
    return [room for room in every_room() if room.is_armed and _layer_of(room, module) is not None]


def every_room() -> list[StepRoom]:
    """All rooms that there are."""
    return _rooms.values()


def _layer_of(room: StepRoom, module: nn.Module) -> Layer | None:
    module = without_wrappers(module)
    return next((layer for layer in room.parting.layers if layer.places.module() is module), None)


def _rooms_of_family(family: list[Any]) -> list[StepRoom]:
    return _each_once(room for member in family if (room := _rooms.get(member)) is not None)


def _each_once(rooms: Iterable[StepRoom]) -> list[StepRoom]:
    return list({id(room): room for room in rooms}.values())


def _new_room(family: list[Any]) -> StepRoom:
    return StepRoom(family, Parting(getattr(innermost(family), "defaults", {})), _loaded, check_room, _came)


def _check_optimizer(optimizer: Any) -> None:
    check_is_optimizer(optimizer)
    for one in with_held(optimizer):
        if not hasattr(one, "__dict__") or not hasattr(one, "__weakref__"):
            raise TypeError(
                f"{type(one).__name__} has __slots__, so nothing can be hung onto it; apply the rules to the optimizer "
                "inside it"
            )


def _came(room: StepRoom) -> None:
    warn_of_strays([room], every_room())


def _loaded(optimizer: Any) -> None:
    room = _rooms.get(optimizer)
    if room is not None:
        room.counts_in_checkpoint = room.starts_in_checkpoint = lambda: True  # what is saved from now on is this run
        room.parting.loaded(optimizer.param_groups, lambda is_told: _steps_counted(optimizer, room, is_told))
        room.parting.starts.loaded(optimizer, room.parting.with_starts(optimizer.param_groups))


def _steps_counted(optimizer: Any, room: StepRoom, is_told: bool) -> int:
    """The steps that were done before a state was saved, as the optimizer itself has counted them."""
    own = [int(state["step"]) for state in optimizer.state.values() if isinstance(state, dict) and "step" in state]
    steps = max(own, default=0 if is_told else room.parting.strengths.steps_done())
    if steps == 0 and not is_told:
        rank_zero_warn(TELLS_NO_STEPS)
    return steps
