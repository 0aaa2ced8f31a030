"""Decay rules × the param groups of an optimizer: what is to be stepped over, with which λ, at this moment."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor

from lightning_regdecay.groups.groups import NAMES_KEY, ON_META
from lightning_regdecay.groups.places import Finds, Found, Place, Places
from lightning_regdecay.optim.layers import Layer, is_own, own_place
from lightning_regdecay.optim.parts import Part, Parted, Pull, no_lists
from lightning_regdecay.optim.seen import Group
from lightning_regdecay.optim.starts import Starts
from lightning_regdecay.optim.strengths import Strengths, as_number, first_peak
from lightning_regdecay.rules.rules import DecayRule
from lightning_regdecay.rules.schedules import PEAK_KEY, SCHEDULE_KEY, STEP_KEY, DecaySchedule, schedule_of

SEVERAL = (
    "this optimizer notes numbers in its param groups that go by the lr, and with factors on the lr (lr_mult) they "
    "differ inside of one: a checkpoint has one of each, so a run that goes on from it will not be that of one to the "
    "bit; build the optimizer over the decay groups for that"
)


class Parting:
    """The param groups of one optimizer, or of several that share them, under rules."""

    def __init__(self, defaults: Mapping[str, Any] | None = None) -> None:
        self.layers: list[Layer] = []
        self.strengths = Strengths()
        self.starts = Starts()
        self.defaults: Mapping[str, Any] = {} if defaults is None else defaults
        """The ``defaults`` of the optimizer that steps."""
        self.is_cut_anew = False
        """Whether param groups were cut that were not before."""
        self.has_news = True
        """Whether parameters came, or went."""
        self.has_pulls = False
        """Whether anything is decayed element by element."""
        self._parted: dict[int, Parted] = {}
        self._has_moved = self._has_several = False

    # In a step.

    def begin(self, lists: Iterable[list[Group]], begun: Container[int] | None = None) -> None:
        """Set the λ of a step, in the parts and in groups that have a schedule themselves.

        Args:
            lists: of all param groups; what is known of others is forgotten.
            begun: where these are some of all, the ids of those that begin a step; that of others goes on.

        Raises:
            ValueError: for a schedule whose length is not known, or parameters on the meta device.
        """
        groups = [group for groups in lists for group in groups]
        every = self._up_to_date(groups)
        if begun is None and len(every) != len(self._parted):
            self._parted = {id(parted.group): parted for parted in every}
        for number, parted in enumerate(every):
            if parted.is_on_meta:
                raise ValueError(ON_META.format(group=str(parted.group.get("name", number))))
            if parted.has_strengths:
                for part in parted.parts:
                    self._set(part, parted)
            elif begun is None or id(parted.group) in begun:
                self._follow(parted)
                if parted.is_cut:
                    parted.take_changes()
                    self._set_pulls(parted)

    def go_on(self, groups: list[Group]) -> None:
        """Take up, in the middle of a step, what a closure or a hook has set; λ that the optimizer has set stays."""
        for parted in self._up_to_date(groups):
            for part in parted.parts if parted.has_strengths else ():
                if not part.is_set:
                    self._set(part, parted)
            if not parted.has_strengths:
                self._set_pulls(parted)

    def _set_pulls(self, parted: Parted) -> None:
        """The λ of a param group that was built as decay group, where decay is done element by element."""
        for part in parted.parts:
            for pull in part.pulls:
                pull.weight_decay = as_number(parted.group.get("weight_decay"))

    def _set(self, part: Part, parted: Parted) -> None:
        if part.pulls:
            for pull in part.pulls:
                pull.weight_decay = as_number(self._strength(pull.place, parted))
                pull.held = None if pull.place.schedule is None else pull.weight_decay
            part.set_weight_decay(0.0)
        elif part.number is not None:
            if part.group.get("weight_decay") is part.number:
                part.is_set = True
            else:
                part.set_weight_decay(part.number)
        elif part.rule is not None:
            value = self._strength(part.place, parted)
            part.held = None if part.schedule is None else value
            part.set_weight_decay(value)

    @property
    def asks_for_elements(self) -> bool:
        """Whether rules ask for decay element by element, wherever their parameters are."""
        return any(place.is_by_element for layer in self.layers for place in layer.places.by_name.values())

    def by_element(self, groups: Iterable[Group]) -> list[Part]:
        """Those of some param groups, as they stand in a step, that are decayed element by element."""
        if not self.has_pulls:
            return []
        ids = {id(group) for group in groups}
        parts = (part for parted in self._parted.values() if parted.is_cut for part in parted.parts)
        return [part for part in parts if part.pulls and id(part.group) in ids]

    def with_starts(self, groups: list[Group]) -> list[tuple[Found, DecayRule]]:
        """The parameters of some param groups that decay toward a start, with their rules."""
        parts = [part for parted in self._up_to_date(groups) for part in parted.parts if part.pulls]
        return [
            (found, place.rule)
            for part in parts
            for place in part.place.each
            if place.rule is not None and place.rule.toward is not None
            for found in part.found.values()
        ]

    def inside(self, group: Group) -> list[Group]:
        """What stands in the place of a param group in a step."""
        parted = self._parted.get(id(group))
        return [group] if parted is None or not parted.is_cut else [part.group for part in parted.parts]

    def owners(self) -> dict[int, Group]:
        """From the id of a part to its param group."""
        return {id(part.group): p.group for p in self._parted.values() if p.is_cut for part in p.parts}

    def write_back(self) -> None:
        """Put into param groups what the optimizer has written into their parts."""
        for parted in self._parted.values():
            if parted.is_cut:
                parted.write_back()
                if parted.has_several and not self._has_several:
                    self._has_several = True
                    rank_zero_warn(SEVERAL)

    def counts(self, groups: Iterable[Group]) -> list[tuple[Group, int]]:
        """The counts of steps of param groups after one step more."""
        return [(group, int(group[STEP_KEY]) + 1) for group in groups if STEP_KEY in group]

    def set_counts(self, counts: Iterable[tuple[Group, int]]) -> None:
        """Set counts of steps."""
        for group, count in counts:
            group[STEP_KEY] = count
            parted = self._parted.get(id(group))
            if parted is not None:
                parted.seen.note(group, STEP_KEY)

    # Outside of steps.

    def changes(self, groups: list[Group]) -> bool:
        """Whether the steps of an optimizer are others with the rules than without."""
        return any(parted.is_cut or schedule_of(parted.group) is not None for parted in self._up_to_date(groups))

    def has_cut(self) -> bool:
        """Whether parts take the place of a param group."""
        return any(parted.is_cut for parted in self._parted.values())

    def has_factors(self) -> bool:
        """Whether all of these are there for a factor on the lr alone."""
        return all(parted.is_ours for parted in self._parted.values() if parted.is_cut)

    def look_again(self) -> None:
        """Find the places of all parameters anew before the next step."""
        for parted in self._parted.values():
            parted.members = None

    def take_up_rules(self, groups: list[Group], finds: Finds) -> None:
        """Make the parts, and the counts of steps, before anything is stepped or saved."""
        for parted in self._up_to_date(groups, finds):
            self._set_own_strength(parted)
        self.is_cut_anew = False  # whoever brings rules has checked them

    def begin_run(self, groups: list[Group], steps_done: int | None) -> None:
        """Ask lengths and peaks anew, as a run begins.

        Args:
            groups: the param groups.
            steps_done: the steps of the run that were done before, None for those that the param groups tell.
        """
        self.strengths.ask_anew()
        for parted in self._up_to_date(groups):
            group = parted.group
            if steps_done == 0:
                self._find_peak(parted)
            if STEP_KEY in group:
                told = int(group[STEP_KEY]) or self.strengths.steps_done()
                group[STEP_KEY] = told if steps_done is None else steps_done
            _forget_held(parted)
            self._follow(parted)

    def _find_peak(self, parted: Parted) -> None:
        """An lr that somebody has set since is the peak from now on, as that of a learning rate finder.

        Not the first lr of a warm-up, which an lr scheduler sets together with ``initial_lr``.
        """
        group = parted.group
        lrs = as_number(group.get("lr")), as_number(group.get("initial_lr"))
        if lrs[0] == parted.lrs[0]:
            parted.peak_lr = max(parted.peak_lr, *lrs)
        elif lrs[1] == parted.lrs[1]:
            parted.peak_lr = lrs[0]
        else:
            parted.peak_lr = max(lrs)
        parted.lrs = lrs
        if PEAK_KEY in group:
            group[PEAK_KEY] = parted.peak_lr

    def refresh(self, groups: list[Group]) -> None:
        """Set the λ of the next step in every param group that has a schedule itself: in all, or by an error in none.

        Raises:
            ValueError: for a length, or a peak of the lr, that is not known.
        """
        every = self._up_to_date(groups)
        for parted in every:
            for part in parted.parts if parted.has_strengths else ():
                for place in part.place.each:
                    if place.schedule is not None:
                        self._strength(place, parted)
            self._scheduled(parted)
        for parted in every:
            self._follow(parted)

    def seen(self, groups: list[Group], finds: Finds | None = None) -> list[Parted]:
        """Param groups with their parts as they are now; nothing is noted in them, or of them."""
        every = [self._parted.get(id(group)) for group in groups]
        if all(parted is not None and parted.is_up_to_date() for parted in every):
            finds = {}
        elif finds is None:
            finds = self.find()
        found = []
        not_lists = no_lists(groups)
        for group, parted in zip(groups, every):
            if parted is None or parted.group is not group or not parted.is_up_to_date():
                parted = self._new(group)
                parted.divide(finds, self._is_ours(group, finds), not_lists)
            elif parted.is_cut:
                parted.take_changes()
            found.append(parted)
        return found

    def find(self) -> Finds:
        """Where the rules put the parameters of their models."""
        every = [layer.places.find() for layer in self.layers]
        return {key: found for finds in reversed(every) for key, found in finds.items()}

    def strength_of(self, part: Part | Pull, parted: Parted) -> Any:
        """λ of a part, or of a piece of its tensors, at its last step, or before that at the next one."""
        if part.held is not None:
            return part.held
        if parted.is_ours:
            return parted.group.get("weight_decay")
        try:
            return self._strength(part.place, parted)
        except ValueError:  # before the run begins, its length is not known
            return 0.0 if part.place.schedule is None else part.place.schedule.first

    def absorb(self, other: Parting) -> None:
        """Take over the rules, and what is known of their param groups, from another."""
        mine = [layer.places.module() for layer in self.layers]
        self.layers += [layer for layer in other.layers if layer.places.module() not in mine]
        self._parted = {**other._parted, **self._parted}
        self.strengths.absorb(other.strengths)  # starts are in the state of the optimizer, or given anew

    def own_strengths(self, groups: Iterable[Group], places: Places) -> dict[str, Any]:
        """λ of each param group that was built as decay group of some rules, by its name, as they are today."""
        known = {name: (layer, value) for layer in self.layers for name, value in layer.own.items()}
        found: dict[str, Any] = {}
        for group in groups:
            place = own_place(group, places)
            if place is None or place.rule is None or place.rule.decay_mult is None:
                continue
            name, held = place.group, group.get("weight_decay")
            if name not in known or known[name][1] != held:
                found[name] = held  # the factor is in it
                continue
            before = known[name][0].places.by_name[name].rule
            factor = None if before is None else before.decay_mult
            mult = place.rule.decay_mult
            if factor == mult:
                found[name] = held
            else:
                found[name] = mult * (held / factor if factor else as_number(self.defaults.get("weight_decay")))
        return found

    def _up_to_date(self, groups: list[Group], finds: Finds | None = None) -> list[Parted]:
        """Param groups with their parts, made anew where that is needed."""
        known = self._parted
        found = []
        stale = finds is not None
        for group in groups:
            parted = known.get(id(group))
            if parted is None or parted.group is not group or not parted.is_up_to_date():
                stale = True
                break
            changed = parted.take_changes() if parted.is_cut else []
            if parted.has_strengths and "weight_decay" in changed:
                self._warn_of_moved(parted)
            found.append(parted)
        return self._divide(groups, self.find() if finds is None else finds) if stale else found

    def _divide(self, groups: list[Group], finds: Finds) -> list[Parted]:
        known = {id(group): self._parted.get(id(group)) for group in groups}
        gone = {
            id(parted.members[0]): parted for key, parted in self._parted.items() if parted.members and key not in known
        }
        self.has_news, not_lists = True, no_lists(groups)
        done = max((int(parted.group.get(STEP_KEY, 0)) for parted in self._parted.values()), default=0)
        found, replaced = [], []
        for group in groups:
            parted = self._parted.get(id(group))
            if parted is None or parted.group is not group:
                parted = self._parted[id(group)] = self._new(group)
                before = gone.get(id(group["params"][0])) if group["params"] else None
                if before is not None:
                    replaced.append(parted)
                    if PEAK_KEY not in group and "initial_lr" not in group:
                        parted.peak_lr = max(parted.peak_lr, before.peak_lr)
            was_cut = parted.is_cut
            parted.divide(finds, self._is_ours(group, finds), not_lists)
            self.is_cut_anew |= parted.is_cut and len(parted.parts) > 1 and not was_cut
            self.is_cut_anew |= not parted.is_ours and any(part.place.options for part in parted.parts)
            self.is_cut_anew |= not was_cut and any(part.pulls for part in parted.parts)
            self._note_schedule(parted, done)
            found.append(parted)
        self.has_pulls = any(part.pulls for parted in self._parted.values() for part in parted.parts)
        if any(is_own(group, layer.places) for layer in self.layers for group in groups):
            for parted in found:
                if NAMES_KEY not in parted.group and all(parted.names):
                    parted.group[NAMES_KEY] = list(parted.names)
                    parted.take_changes()
        if replaced:
            self._take_up(replaced)
        return found

    def _new(self, group: Group) -> Parted:
        parted = Parted(group, self.defaults)
        parted.peak_lr = as_number(group.get(PEAK_KEY)) or first_peak(group)
        return parted

    def _note_schedule(self, parted: Parted, done: int) -> None:
        """Have the plain keys in a param group that its schedule needs, and no others."""
        group = parted.group
        schedule = schedule_of(group)
        if parted.has_strengths and parted.is_scheduled:
            group.setdefault(STEP_KEY, done)
        elif schedule is None or parted.has_strengths:
            group.pop(STEP_KEY, None)
        else:
            group.setdefault(STEP_KEY, 0)
            if schedule.goes_by_lr:
                group.setdefault(PEAK_KEY, parted.peak_lr)
        parted.take_changes()

    # After a state was loaded.

    def loaded(self, groups: list[Group], steps_done: Callable[[bool], int]) -> None:
        """Take up a state that was loaded: the steps it tells, and the rules' λ over its own.

        Args:
            groups: the param groups, which torch makes anew.
            steps_done: tells the steps that the optimizer itself has counted; asked with whether the groups tell, too,
                which may be too few: without rules nobody counts there.
        """
        told = [int(group[STEP_KEY]) for group in groups if STEP_KEY in group]
        every = self._up_to_date(groups)
        self._take_up(every)
        counting = [group for group in groups if STEP_KEY in group]
        if counting:
            own = steps_done(bool(told))
            steps = max(told, default=0)
            # What torch.distributed.checkpoint steps to have a state, an optimizer counts, too.
            steps = own if own > steps + 1 or not told else steps
            for group in counting:
                group[STEP_KEY] = steps
        for parted in every:
            parted.take_changes()
            with contextlib.suppress(ValueError):  # before the run begins, its length is not known
                self._follow(parted)

    def _take_up(self, every: list[Parted]) -> None:
        """The rules' λ over that of a checkpoint."""
        self.strengths.ask_anew()
        for parted in every:
            self._set_own_strength(parted)
            _forget_held(parted)

    def _set_own_strength(self, parted: Parted) -> None:
        """Over what a checkpoint brought, the rules' λ of a param group that was built as decay group."""
        places = [place for layer in self.layers if (place := own_place(parted.group, layer.places)) is not None]
        if parted.has_strengths or not places or places[0].rule is None:
            return
        group, rule = parted.group, places[0].rule
        if isinstance(rule.weight_decay, DecaySchedule):
            group[SCHEDULE_KEY] = rule.weight_decay.as_dict()
            group.setdefault(STEP_KEY, 0)
        else:
            group.pop(SCHEDULE_KEY, None)
            group.pop(STEP_KEY, None)
            held = group.get("weight_decay")
            value = rule.weight_decay if rule.decay_mult is None else self._own(places[0].group, held)
            if value != held:
                group["weight_decay"] = value

    # Strengths.

    def _own(self, name: str, other: Any) -> Any:
        """λ of the param group that was built as a decay group, another where none was."""
        return next((layer.own[name] for layer in self.layers if name in layer.own), other)

    def _is_ours(self, group: Group, finds: Finds) -> bool:
        """Whether a param group is one that was built as decay group, with the parameters that it is to have.

        Tensors with pieces in several groups are in a param group of theirs, which has the λ of none of them.
        """
        for layer in self.layers:
            place = own_place(group, layer.places)
            if place is not None:
                if place.pieces:
                    return False
                found = (finds.get(id(parameter)) for parameter in group["params"])
                return all(one is None or one.place is place for one in found)
        return False

    def _strength(self, place: Place, parted: Parted) -> Any:
        """λ of a rule for the next step."""
        rule = place.rule
        if rule is None:
            return parted.group.get("weight_decay")
        if isinstance(rule.weight_decay, DecaySchedule):
            lr_mult = 1.0 if place.lr_mult is None else place.lr_mult
            return self.strengths.weight_decay(rule.weight_decay, parted.group, _peak(parted), place.group, lr_mult)
        if rule.decay_mult is None:
            return rule.weight_decay
        given = parted.group.get("weight_decay", self.defaults.get("weight_decay"))
        return self._own(place.group, rule.decay_mult * (0.0 if given is None else given))

    def _scheduled(self, parted: Parted) -> float | None:
        """λ for the next step of a param group that has a schedule itself."""
        group = parted.group
        schedule = schedule_of(group)
        if schedule is None or parted.has_strengths:
            return None
        name = str(group.get("name"))
        if parted.weight_decay is not None and float(group["weight_decay"]) != parted.weight_decay:
            raise RuntimeError(
                f"two schedules set the weight decay of group {name!r}: that of its decay rule has set "
                f"{parted.weight_decay:g}, and something else {float(group['weight_decay']):g}; take one of them "
                "away"
            )
        return self.strengths.weight_decay(schedule, group, _peak(parted), name, parted.lr_mult)

    def _follow(self, parted: Parted) -> None:
        """Set the λ of a param group that has a schedule itself."""
        value = self._scheduled(parted)
        if value is None:
            return
        held = parted.group.get("weight_decay")
        if isinstance(held, Tensor):  # which spares a compiled step a compilation for each new value
            held.fill_(value)
            value = float(held)
        else:
            parted.group["weight_decay"] = value
        parted.weight_decay = value

    def _warn_of_moved(self, parted: Parted) -> None:
        places = [place for part in parted.parts for place in part.place.each]
        by_number = [place.group for place in places if place.rule and place.rule.decay_mult is None]
        if by_number and not self._has_moved:
            self._has_moved = True
            rank_zero_warn(
                f"the weight decay of a param group was set to {as_number(parted.group.get('weight_decay')):g} while "
                f"training: decay rules that give λ hold against it (in groups {', '.join(by_number)}); rules with "
                "decay_mult follow it, and a schedule moves λ by itself"
            )


def _forget_held(parted: Parted) -> None:
    parted.weight_decay = None
    for part in parted.parts:
        part.held = None
        for pull in part.pulls:
            pull.held = None


def _peak(parted: Parted) -> float:
    return as_number(parted.group.get("max_lr", parted.peak_lr))
