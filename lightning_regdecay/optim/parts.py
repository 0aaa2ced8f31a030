"""What an optimizer steps over in the place of one param group: parts of it, a decay group each.

Of a param group that was built as a decay group, λ is in the group itself; it has parts where a rule has a factor on
the lr, as the group has the lr without it.

Parts live on between steps, as an optimizer may count something in each. What is set in their param group reaches every
part, what the optimizer writes into a part reaches their param group.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Mapping
from operator import is_
from typing import Any

import torch
from torch import Tensor

from lightning_regdecay.groups.places import OUTSIDE, Finds, Found, Place
from lightning_regdecay.optim.seen import NOTHING, Changes, Group, Seen, copied, is_mutable
from lightning_regdecay.optim.strengths import as_number
from lightning_regdecay.rules.rules import DecayRule
from lightning_regdecay.rules.schedules import LR_MULT_KEY, STEP_KEY, DecaySchedule


class Pull:
    """λ of the elements of a part that are in one decay group, where decay is done element by element."""

    __slots__ = ("held", "place", "weight_decay")

    def __init__(self, place: Place) -> None:
        self.place = place
        self.weight_decay: float = 0.0
        """λ of the step under way."""
        self.held: float | None = None
        """λ at the last step, where it is on a schedule."""


class Part:
    """A copy of a param group with the parameters of one decay group and its λ."""

    __slots__ = ("found", "group", "held", "is_set", "lr_mult", "number", "numbers", "place", "pulls", "rule", "seen")

    def __init__(self, group: Group) -> None:
        self.group = group
        self.seen = Seen(group)
        """Its values when the optimizer came."""
        self.place = OUTSIDE
        self.rule: DecayRule | None = None
        """The rule by which it has a λ of its own."""
        self.lr_mult: float | None = None
        """The factor on the lr of its param group."""
        self.numbers: list[int] = []
        """The numbers of its parameters in their param group."""
        self.number: float | None = None
        """λ of the rule, where that is a number."""
        self.held: float | None = None
        """λ at the last step, where it is on a schedule."""
        self.is_set = False
        """Whether λ is set for the step under way."""
        self.pulls: list[Pull] = []
        """Where decay is done element by element, for each piece of its tensors: then λ in it is 0."""
        self.found: dict[int, Found] = {}
        """Its parameters, by their ids, in the model."""

    def put(self, place: Place, found: Mapping[int, Found | None], by_rule: bool, lr_mult: float | None) -> None:
        """Give it the place, the parameters and the factor that it has from now on.

        Args:
            place: the place.
            found: by their numbers in their param group, its parameters.
            by_rule: whether its rule is to set λ in it.
            lr_mult: the factor on the lr of the param group.
        """
        numbers = list(found)
        self.found = {id(one.parameter): one for one in found.values() if one is not None}
        known = {pull.place: pull for pull in self.pulls}
        self.pulls = [known.get(one) or Pull(one) for one in place.each] if place.is_by_element else []
        rule = place.rule if by_rule and not self.pulls else None
        if self.rule is not None and rule is None:
            self.group.pop("weight_decay", None)  # that of the rule before, which takes it no more
        if self.lr_mult is not None and lr_mult is None:
            self.group.pop("lr", None)
        self.lr_mult = lr_mult
        self.place, self.rule, self.numbers, self.is_set = place, rule, numbers, False
        self.number = rule.weight_decay if rule is not None and isinstance(rule.weight_decay, float) else None

    @property
    def schedule(self) -> DecaySchedule | None:
        """The schedule of λ, where the rule has one."""
        return None if self.rule is None else self.place.schedule

    @property
    def sets_weight_decay(self) -> bool:
        """Whether it has a λ of its own, not that of its param group."""
        return self.rule is not None or bool(self.pulls)

    def set_weight_decay(self, value: Any) -> None:
        """Set λ; a tensor stays the same tensor, which spares a compiled step a compilation for each new value."""
        self.is_set = True
        own = self.group.get("weight_decay")
        if isinstance(own, Tensor):
            own.fill_(value)
        elif own is value or own == value:
            return
        else:
            self.group["weight_decay"] = value
        self.seen.note(self.group, "weight_decay")

    def set_lr(self, lr: Any, lr_mult: float) -> None:
        """Set the lr, given that of the param group; a tensor stays the same tensor, unless it has a gradient."""
        own = self.group.get("lr")
        if not isinstance(lr, Tensor) or lr.requires_grad:
            self.group["lr"] = None if lr is None else lr_mult * lr
        elif isinstance(own, Tensor) and own is not lr and not own.requires_grad:
            with torch.no_grad():
                own.copy_(lr_mult * lr)
        else:
            self.group["lr"] = lr_mult * lr


class Parted:
    """One of their param groups with its parts.

    Args:
        group: the param group.
        defaults: the ``defaults`` of the optimizer. Tensors there are shared by all param groups.
    """

    __slots__ = (
        "_before",
        "_defaults",
        "_no_lists",
        "group",
        "has_several",
        "is_cut",
        "is_on_meta",
        "is_ours",
        "lrs",
        "members",
        "names",
        "parts",
        "peak_lr",
        "seen",
        "weight_decay",
    )

    def __init__(self, group: Group, defaults: Mapping[str, Any]) -> None:
        self.group = group
        self._defaults = defaults
        self._no_lists: Container[str] = ()
        self.members: list[Tensor] | None = None
        """The parameters that the parts were made of; None before, and where they are to be made anew."""
        self._before: list[Tensor] = []
        self.names: list[str] = []
        """Of the members in the model, empty for one that is of no model."""
        self.parts: list[Part] = []
        self.is_cut = False
        """Whether the parts take its place in a step."""
        self.is_ours = False
        """Whether it was built as a decay group, so that λ is set in the group itself."""
        self.has_several = False
        """Whether the optimizer keeps numbers for each part, of which the group can hold one only."""
        self.seen = Seen(group)
        self.lrs = as_number(group.get("lr")), as_number(group.get("initial_lr"))
        """Its ``lr`` and ``initial_lr`` when the peak was found."""
        self.peak_lr: float = 0.0
        self.weight_decay: float | None = None
        """λ that a schedule has set in the group itself."""
        self.is_on_meta = False

    @property
    def has_strengths(self) -> bool:
        """Whether λ is set in the parts."""
        return self.is_cut and not self.is_ours

    @property
    def lr_mult(self) -> float:
        """The factor on its lr, where it was built as a decay group."""
        return next((one.lr_mult for one in self.parts if one.lr_mult is not None), 1.0)

    @property
    def is_scheduled(self) -> bool:
        """Whether a rule with a schedule takes members of it."""
        return any(place.schedule is not None for part in self.parts for place in part.place.each)

    def is_up_to_date(self) -> bool:
        """Whether the group has the members that the parts were made of."""
        members, known = self.group["params"], self.members
        return known is not None and len(members) == len(known) and all(map(is_, members, known))

    def divide(self, finds: Finds, is_ours: bool, no_lists: Container[str]) -> None:
        """Make a part for every place that the members have, in the order of these; parts that were there go on.

        Args:
            finds: where the parameters are.
            is_ours: whether the group was built as a decay group, of these parameters.
            no_lists: options that have no entry for each parameter, as other param groups show.
        """
        self._no_lists = no_lists
        members = list(self.group["params"])
        found = [finds.get(id(parameter)) for parameter in members]
        numbers: dict[Place, list[int]] = {}
        for number, one in enumerate(found):
            numbers.setdefault(OUTSIDE if one is None else one.place, []).append(number)
        before = {id(parameter): part for part in self.parts for parameter in part.group["params"]}
        self.parts = []
        for place, own in numbers.items():
            part = before.get(id(members[own[0]]))
            if part is None or part in self.parts:
                part = Part(copy.copy(self.group))
                part.group["params"] = []
            lr_mult = _lr_mult_left(self.group, place) if is_ours else place.lr_mult
            part.put(place, {number: found[number] for number in own}, not is_ours, lr_mult)
            self.parts.append(part)
        self.is_ours = is_ours
        self.is_cut = any(
            part.lr_mult is not None or part.pulls or (not is_ours and part.place.rule is not None)
            for part in self.parts
        )
        names = dict(zip(map(id, self.members or self._before), self.names))
        self.members = self._before = members
        # Of one that the model has let go of, the name that it had.
        self.names = [names.get(id(p), "") if one is None else one.name for p, one in zip(members, found)]
        self.is_on_meta = any(parameter.is_meta for parameter in members)
        self.take_changes()
        self.seen.note(self.group, "params")
        for part in self.parts:
            for key in [*self.group]:
                self._give(part, key)
            part.group.pop(STEP_KEY, None)
            part.seen = Seen(part.group)

    def take_changes(self) -> list[str]:
        """Give the parts what was set in their param group since; the keys of it."""
        set_now = self.seen.changes(self.group)
        if set_now is NOTHING:
            return []
        changed, gone = set_now
        for part in self.parts:
            for key in changed:
                self._give(part, key, anew=True)
            for key in gone:
                part.group.pop(key, None)
            part.seen = Seen(part.group)
            part.is_set = part.is_set and "weight_decay" not in changed
        self.seen = Seen(self.group)
        return changed

    def write_back(self) -> None:
        """Put into their param group what the optimizer has written into the parts."""
        every = [part.seen.changes(part.group) for part in self.parts]
        if all(changes is NOTHING for changes in every):
            return
        for part, (changed, gone) in zip(self.parts, every):
            by_rule = ["weight_decay"] if part.sets_weight_decay else []
            for key in changed:
                if key == "lr" and part.lr_mult is not None:
                    if part.lr_mult:  # which an optimizer has set itself
                        self.group["lr"] = part.group["lr"] / part.lr_mult
                elif key not in by_rule:
                    self._put(part, key, every)
                    self.has_several |= part.lr_mult is not None and self._differs(key)
            for key in gone:
                if key not in by_rule:
                    self.group.pop(key, None)
        self.seen = Seen(self.group)
        for part in self.parts:
            part.seen = Seen(part.group)

    def _give(self, part: Part, key: str, anew: bool = False) -> None:
        """Put an option of their param group into a part.

        Args:
            part: the part.
            key: the option.
            anew: it was set; else a part that has its own keeps it.
        """
        value = self.group[key]
        own = part.group.get(key)
        if key == STEP_KEY:
            return
        if key == "weight_decay" and part.pulls:
            part.group[key] = 0.0
        elif key == "lr" and part.lr_mult is not None:
            part.set_lr(value, part.lr_mult)
        elif self._is_list(key):
            entries = [value[number] for number in part.numbers]
            if own is not value and type(own) is list:
                own[:] = entries
            else:
                part.group[key] = entries
        elif not anew and key in part.group and own is not value:
            return
        elif self._is_counted_in(part, key):
            part.group[key] = value.detach().clone() if isinstance(value, Tensor) else copied(value)
        else:
            part.group[key] = value

    def _is_counted_in(self, part: Part, key: str) -> bool:
        """Whether an option is one that a part is to have a copy of, as something may be written into it."""
        value = self.group[key]
        if key == "weight_decay" and part.sets_weight_decay:
            return isinstance(value, Tensor)
        if len(self.parts) == 1 or not (isinstance(value, Tensor) or is_mutable(value)):
            return False
        return key not in self._defaults or key == "weight_decay"

    def _put(self, part: Part, key: str, every: Iterable[Changes]) -> None:
        """Put an option of a part into their param group."""
        value, own = part.group[key], self.group.get(key)
        if key == "params":
            return
        if self._is_list(key):
            for number, entry in zip(part.numbers, value):
                self.group[key][number] = entry
        elif all(key in changed for changed, _ in every) and self._is_list_of_parts(key):
            if part is self.parts[-1]:
                entries = {n: e for one in self.parts for n, e in zip(one.numbers, one.group[key])}
                self.group[key] = [entries[number] for number in range(len(entries))]
        elif isinstance(value, Tensor) and value is not own:
            if isinstance(own, Tensor) and own.shape == value.shape:
                with torch.no_grad():
                    own.copy_(value)
            else:
                self.group[key] = value.detach().clone()
        else:
            self.group[key] = value if len(self.parts) == 1 else copied(value)

    def _differs(self, key: str) -> bool:
        """Whether the optimizer has written numbers into the parts that are not those of one param group."""
        values = [part.group.get(key) for part in self.parts]
        return all(isinstance(value, (int, float)) for value in values) and len(set(values)) > 1

    def _is_list(self, key: str) -> bool:
        """Whether an option is a list with an entry for each parameter, as ``params`` and ``param_names``."""
        value = self.group.get(key)
        return key == "params" or (
            type(value) is list
            and len(value) == len(self.group["params"])
            and self._defaults.get(key) is None
            and key not in self._no_lists
        )

    def _is_list_of_parts(self, key: str) -> bool:
        """Whether the optimizer has just made a list with an entry for each parameter in every part."""
        return key not in self.group and all(
            type(part.group[key]) is list and len(part.group[key]) == len(part.numbers) for part in self.parts
        )


def _lr_mult_left(group: Group, place: Place) -> float | None:
    """The factor of a rule on the lr of a group that was built as a decay group, less what its lr has in it already."""
    given, wanted = group.get(LR_MULT_KEY), place.lr_mult
    if given is None or given == wanted:
        return None if given == wanted else wanted
    return (1.0 if wanted is None else wanted) / given if given else wanted


def no_lists(groups: Iterable[Group]) -> frozenset[str]:
    """The options that are lists in param groups, and in some of another length than their parameters."""
    return frozenset(
        key
        for group in groups
        for key, value in group.items()
        if type(value) is list and len(value) != len(group["params"])
    )
