"""What can be known before the first step: whether rules can be in force in an optimizer, and what they miss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.fabric.utilities import rank_zero_warn
from torch import nn

from lightning_regdecay.groups.groups import NAMES_KEY, DecayGroups
from lightning_regdecay.groups.matching import listed
from lightning_regdecay.groups.parameters import ModelParameter, model_parameters
from lightning_regdecay.groups.places import OUTSIDE, Finds, Places
from lightning_regdecay.optim.decoupling import check_decoupled, reads_option
from lightning_regdecay.optim.holders import innermost, is_deepspeed, refuse_numbered, shared_lists, with_held
from lightning_regdecay.optim.layers import Layer, built_options, own_place
from lightning_regdecay.optim.parting import Parting
from lightning_regdecay.optim.parts import Part, Parted
from lightning_regdecay.optim.pulling import CANNOT, UNDER_DEEPSPEED
from lightning_regdecay.optim.starts import Starts
from lightning_regdecay.optim.step_room import StepRoom
from lightning_regdecay.optim.trial import kind_of
from lightning_regdecay.rules.names import hint
from lightning_regdecay.rules.rules import DecayRule
from lightning_regdecay.rules.selectors import equal_options
from lightning_regdecay.rules.toward import START

NO_WEIGHT_DECAY = "{optimizer} knows no weight decay, so decay rules cannot work with it; use one such as AdamW or SGD"
_MOST_NAMED = 8  # parameters in a message


def check_family(family: list[Any], rooms: list[StepRoom], places: Places, finds: Finds) -> None:
    """Raise where rules cannot be in force in the steps of optimizers; warn where they would do nothing.

    Args:
        family: optimizers that step over the same param groups.
        rooms: those that they have.
        places: where the rules put the parameters of the model.
        finds: these parameters.

    Raises:
        ValueError: for optimizers that know no weight decay, options of a rule in those that were not built over the
            decay groups, a timescale in one that is coupled, rules of two models for one parameter, and optimizers
            whose param groups cannot be others in a step.
    """
    kind = type(family[0]).__name__
    if not shared_lists(family):
        raise ValueError(
            f"decay rules cannot be put in force in this {kind}: its param_groups is made anew whenever it is asked "
            "for, so nothing can be put there for a step; apply them to the torch optimizer inside it, or use one of "
            "torch's kind (of fastai, OptimWrapper)"
        )
    trial = Parting(getattr(innermost(family), "defaults", {}))
    trial.layers = [Layer(places)]
    every = _seen(trial, family, rooms, finds)
    _check_alone(rooms, places, finds)
    _check_parts(family, every, rooms, [places])
    _warn_of_no_decay(every, kind, trial.defaults)


def check_room(room: StepRoom) -> None:
    """Raise where the param groups of a room cannot be cut as the rules of today would cut them."""
    places = [layer.places for layer in room.parting.layers]
    _check_parts(room.members, room.parting.seen(room.groups), [room], places)


def _seen(trial: Parting, family: list[Any], rooms: list[StepRoom], finds: Finds) -> list[Parted]:
    groups = [group for groups in shared_lists(family) for group in groups]
    for room in rooms:
        groups = room.theirs(groups)
    return trial.seen(groups, finds)


def _check_options(parted: Parted, kind: str, built: Mapping[str, Any], defaults: Any) -> None:
    """Raise for options of rules, λ and a factor on the lr aside, that a param group was not built with."""
    for place in [part.place for part in parted.parts if part.place is not OUTSIDE]:
        if built and not equal_options(built, place.options):
            raise ValueError(
                f"the options of group {place.group!r} were {dict(built)} when its optimizer was built, and are "
                f"{dict(place.options)} now: λ and a factor on the lr (lr_mult) may change while training, these may "
                "not; set them in optimizer.param_groups, or build the optimizer anew"
            )
        if not equal_options(built, place.options):
            raise ValueError(
                f"group {place.group!r} has the options {listed(sorted(place.options))}; in an optimizer that is not "
                f"built over the decay groups, such as this {kind}, or for parameters that come to it later, rules set "
                "the weight decay and a factor on the lr (lr_mult) alone: build it over them (build_optimizer of "
                "WeightDecayMixin, or build_decay_groups(model, rules).as_param_groups()), or set the options in its "
                "own param groups"
            )
        if place.lr_mult is not None and parted.group.get("lr", defaults.get("lr")) is None:
            raise ValueError(
                f"group {place.group!r} has lr_mult={place.lr_mult:g}, a factor on the lr of its param group, and "
                f"{kind} has no lr there; give it one, or leave lr_mult out"
            )


def _check_parts(family: list[Any], every: list[Parted], rooms: list[StepRoom], places: Sequence[Places]) -> None:
    kind, defaults = type(family[0]).__name__, getattr(innermost(family), "defaults", {})
    layers = [layer for room in rooms for layer in room.parting.layers]
    for parted in every:
        built = [options for one in places if (options := built_options(parted.group, layers, one))]
        _check_options(parted, kind, built[0] if built else {}, defaults)
    is_cut = any(parted.is_cut and len(parted.parts) > 1 for parted in every)
    if is_cut and any(cls.__name__ == "LBFGS" for cls in type(innermost(family)).__mro__):
        raise ValueError(
            f"{kind} takes one param group, so rules cannot have several in its steps; use another optimizer"
        )
    places_of = [place for parted in every for part in parted.parts for place in part.place.each]
    rules = {place.rule for place in places_of if place.rule is not None}
    if any(rule.weight_decay != 0 and rule.decay_mult != 0 for rule in rules):
        check_decays(family)
    for parted in every:
        for part in parted.parts:
            if part.pulls:
                _check_by_element(innermost(family, parted.group), parted, part)
            for place in part.place.each:
                fixed = None if place.schedule is None else place.schedule.of_lr_times_lambda
                if fixed is not None:
                    check_decoupled(innermost(family, parted.group), parted.group, place.group, fixed)
    has_factors = any(part.lr_mult is not None for parted in every for part in parted.parts)
    if is_cut or has_factors:  # without which `base_lrs` were noted
        known = [room.numbered for room in rooms if room.numbered is not None]
        refuse_numbered(family, among=known[0] if known else None)


def _check_by_element(optimizer: Any, parted: Parted, part: Part) -> None:
    """Raise where decay element by element is not the optimizer's own."""
    group = part.place.each[0].group
    if is_deepspeed(optimizer):
        raise ValueError(UNDER_DEEPSPEED)
    if kind_of(optimizer, parted.group) is None:
        raise ValueError(CANNOT.format(group=group, kind=type(optimizer).__name__))


def check_starts(optimizer: Any, finds: Finds, starts: Starts) -> None:
    """Raise for starts that do not fit the parameters of an optimizer, or that a process would not know; on all alike.

    Args:
        optimizer: the one that others step.
        finds: the parameters of the model.
        starts: what is given for them is read into.
    """
    is_apart = any(cls.__name__ == "ZeroRedundancyOptimizer" for cls in type(optimizer).__mro__)
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for found in [one for key, one in finds.items() if key in own]:
        for place in found.place.each:
            rule = place.rule
            if rule is None or rule.start is None:
                continue
            if found.parameter.is_complex() and rule.toward_dtype is not None:
                raise ValueError(
                    f"{found.name!r} is complex, and toward_dtype={rule.toward_dtype!r} would keep the real part of "
                    "its start alone; leave toward_dtype out"
                )
            if rule.start != START:
                starts.given(found, rule)
            elif is_apart:
                raise ValueError(
                    f"group {place.group!r} decays toward its start, which ZeroRedundancyOptimizer would keep on one "
                    "process alone; give the start itself (toward='weights.pt'), or shard by FSDP"
                )


def check_decays(family: list[Any]) -> None:
    """Raise for optimizers without weight decay."""
    every = [held for member in family for held in with_held(member)]
    groups = [group for member in family for group in member.param_groups]
    # What is in groups that were built as decay groups, the rules have put there.
    held = any("weight_decay" in group and NAMES_KEY not in group for group in groups)
    if not held and not any(reads_option(member, "weight_decay") for member in every):
        raise ValueError(NO_WEIGHT_DECAY.format(optimizer=type(family[0]).__name__))


def check_options(optimizer: Any, groups: DecayGroups) -> None:
    """Raise for options of rules that an own optimizer does not know."""
    every = with_held(optimizer)
    kind = type(optimizer).__name__
    for group in groups:
        for option in group.treatment.options:
            if not any(reads_option(one, option) for one in every):
                known = {name for one in every for name in getattr(one, "defaults", {})}
                raise ValueError(
                    f"group {group.name!r} has the option {option!r}, which {kind} does not know; {hint(option, known)}"
                )


def _check_alone(rooms: list[StepRoom], places: Places, finds: Finds) -> None:
    """Raise where other rules, of another model, are in force for the same parameters."""
    module = places.module()
    for room in rooms:
        members = [parameter for group in room.groups for parameter in group["params"]]
        for layer in room.parting.layers if room.is_armed else ():
            other = layer.places.module()
            if other is None or other is module:
                continue
            others = layer.places.find()
            both = [finds[id(p)] for p in members if id(p) in others and id(p) in finds]
            if both:
                raise ValueError(
                    f"both {type(other).__name__} and {type(module).__name__} have decay rules for {both[0].name!r} "
                    f"and {len(both) - 1} more parameters of one optimizer; leave the rules to one of them"
                )


def _warn_of_no_decay(every: list[Parted], kind: str, defaults: Any) -> None:
    decays = [parted for parted in every if _weight_decay(parted, defaults)]
    rules: dict[str, DecayRule] = {}
    for parted in every:
        for part in parted.parts:
            # Of theirs, a group that they leave without decay is meant to be without.
            decays_some = decays if parted.has_strengths else _weight_decay(parted, defaults)
            for place in part.place.each:
                if place.rule is not None and not decays_some:
                    rules[place.group] = place.rule
    for name, rule in rules.items():
        if rule.decay_mult:
            rank_zero_warn(
                f"group {name!r} has decay_mult={rule.decay_mult:g}, a factor on the weight decay of {kind}, which is "
                "0: nothing decays; give the optimizer a weight_decay"
            )


def _weight_decay(parted: Parted, defaults: Any) -> float:
    value = parted.group.get("weight_decay", defaults.get("weight_decay"))
    return 0.0 if value is None else float(value)


def warn_of_strays(rooms: Iterable[StepRoom], every: Iterable[StepRoom]) -> None:
    """Name what rules miss: parameters of a model in no optimizer, and those in an optimizer that the model has not.

    Args:
        rooms: of the optimizers.
        every: all rooms that there are, as a model may have several optimizers.
    """
    every = list(every)
    for room in rooms:
        room.parting.has_news = False
        if any(map(is_deepspeed, [*room.members, *room.roots])):
            continue  # it has put others in the place of the parameters
        modules = _modules(room)
        if not modules:
            continue
        models = [model_parameters(module) for module in modules]
        known = {id(p.parameter) for model in models for p in model}
        groups = room.groups
        if not any(id(p) in known for group in groups for p in group["params"]) and not _bears_rules(room):
            continue
        lost = []
        for parted in room.parting.seen(groups):
            for name, p in zip(parted.names, parted.group["params"]):
                if id(p) not in known:
                    lost.append(name or f"a tensor of shape {tuple(p.shape)}")
        _tell(room, lost, "in an optimizer but not of the model (any more): the weight decay of its param group holds")
        roots = [r for one in every if any(m in modules for m in _modules(one)) for r in one.roots]
        held = {id(p) for root in roots for group in root.param_groups for p in group["params"]}
        missing = [p.name for model in models for p in model if _is_missing(p, held)]
        _tell(room, missing, "trainable, but in no optimizer")


def warn_of_lrs(room: StepRoom) -> None:
    """Name param groups of an own optimizer that begin with another lr than that of their rule."""
    for group in room.groups:
        places = [place for layer in room.parting.layers if (place := own_place(group, layer.places)) is not None]
        lr = places[0].options.get("lr") if places else None
        held = group.get("initial_lr", group.get("lr"))
        if lr is not None and held is not None and not math.isclose(float(held), float(lr), rel_tol=1e-6):
            rank_zero_warn(
                f"group {places[0].group!r} begins with the lr {float(held):g}, and its rule gives {float(lr):g}: an "
                "lr scheduler or callback that sets the lr of all groups, or a checkpoint, has set it; lr_mult is a "
                "factor on whatever they set"
            )


def _is_missing(parameter: ModelParameter, held: set[int]) -> bool:
    return parameter.parameter.requires_grad and id(parameter.parameter) not in held


def _bears_rules(room: StepRoom) -> bool:
    """Whether parameters of an optimizer were under rules, before the model has let go of all of them."""
    return any(layer.places.rules for layer in room.parting.layers) and room.steps_done > 0


def _modules(room: StepRoom) -> list[nn.Module]:
    return [module for layer in room.parting.layers if (module := layer.places.module()) is not None]


def _tell(room: StepRoom, names: list[str], what: str) -> None:
    new = [name for name in dict.fromkeys(names) if (what, name) not in room.told]
    room.told.update((what, name) for name in new)
    if new:
        more = f" and {len(new) - _MOST_NAMED} more" if len(new) > _MOST_NAMED else ""
        rank_zero_warn(f"{listed(new[:_MOST_NAMED])}{more} {'are' if len(new) > 1 else 'is'} {what}")
