"""What is in force in an optimizer, as others are to see it."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_regdecay.groups.groups import NAMES_KEY
from lightning_regdecay.groups.places import OUTSIDE, Found, Place
from lightning_regdecay.groups.regions import Region
from lightning_regdecay.groups.rows import TABLE_HEADER, table_row, total_row
from lightning_regdecay.groups.tables import Table, Tabular
from lightning_regdecay.optim.parting import Parting
from lightning_regdecay.optim.parts import Parted
from lightning_regdecay.optim.seen import Group
from lightning_regdecay.rules.names import safe_name, unique_name
from lightning_regdecay.rules.rules import DecayRule
from lightning_regdecay.rules.schedules import STEP_KEY, DecaySchedule, schedule_of
from lightning_regdecay.rules.toward import START


@dataclass(frozen=True)
class InForce:
    """A param group as the optimizer steps over it.

    Args:
        group: a copy of the param group or, where that is cut, of a part of it.
        text: the selectors of the rule that it is under, empty without one.
        schedule: the schedule of its λ.
        regions: the part of each of its parameters that is in it, None for all of it; nothing where all are whole.
        starts: what this process holds of the weights that each of them decays toward, None for 0; nothing for a group
            that has no start.
    """

    group: Group
    text: str
    schedule: DecaySchedule | None
    regions: Sequence[Region | None] = ()
    starts: Callable[[], list[Tensor | None]] | None = None


class ParamGroupsInForce(Tabular, list[dict[str, Any]]):
    """Param groups as an optimizer steps over them: a list of dictionaries that prints as a table."""

    def __init__(self, every: Iterable[InForce]) -> None:
        every = list(every)
        super().__init__(one.group for one in every)
        self._every = every

    @property
    def table(self) -> Table:
        """The table, a row per group and one for all."""
        rows = [
            table_row(
                str(g["name"]),
                one.text or "-",
                g["params"],
                _shown(g.get("weight_decay")) if "toward" not in g else f"{g['weight_decay']:g} toward {g['toward']}",
                _shown(g.get("lr")),
                one.regions or None,
            )
            for g, one in zip(self, self._every)
        ]
        members = {id(p): p for group in self for p in group["params"]}
        return Table(TABLE_HEADER, [*rows, total_row(members.values())])


def _shown(value: Any) -> Any:
    return "-" if value is None or isinstance(value, (list, tuple)) else float(value)


@dataclass
class _Entry:
    """What is stepped over with one λ of one param group."""

    label: str
    key: Any
    """The same for what is of one decay group, in param groups that are the user's to tell apart."""
    group: Group
    names: list[str]
    text: str
    schedule: DecaySchedule | None
    found: list[Found | None] = field(default_factory=list)
    regions: list[Region | None] = field(default_factory=list)
    rule: DecayRule | None = None

    def takes_in(self, other: _Entry) -> bool:
        """Take in another of the same decay group, if its λ and lr are the same."""
        if any(self.group.get(key) != other.group.get(key) for key in ("weight_decay", "lr")):
            return False
        self.group = {**self.group, "params": [*self.group["params"], *other.group["params"]]}
        self.names, self.found = [*self.names, *other.names], [*self.found, *other.found]
        self.regions = [*self.regions, *other.regions]
        return True


def told(parting: Parting, groups: list[Group], optimizers: Sequence[Any] = ()) -> list[InForce]:
    """Param groups as the optimizer steps over them, computed from what they and the rules are now.

    Args:
        parting: the rules in force.
        groups: the param groups.
        optimizers: the optimizer and those that it holds, one of which steps and has the starts in its state.
    """
    every = parting.seen(groups)
    entries: dict[Any, _Entry] = {}
    for entry in _entries(parting, every):
        known = entries.get(entry.key)
        if known is None or not known.takes_in(entry):
            entries[entry.key if known is None else object()] = entry
    found: list[InForce] = []
    taken: set[str] = set()
    for entry in entries.values():
        name = unique_name(entry.label, taken)
        taken.add(name)
        # DeepSpeed puts one tensor in the place of several, of which all are whole.
        starts, regions = None, entry.regions if any(region is not None for region in entry.regions) else []
        if entry.rule is not None and entry.rule.toward is not None:
            starts = functools.partial(_starts, parting, optimizers, entry.found, entry.rule)
            entry.group["toward"] = START if entry.rule.start == START else "given"
        if regions:
            entry.group["regions"] = ["all" if region is None else region.text for region in regions]
        found.append(InForce(_copy(entry.group, name, entry.names), entry.text, entry.schedule, regions, starts))
    return found


def _entries(parting: Parting, every: Sequence[Parted]) -> Iterator[_Entry]:
    places = {(place.group, _scope(one)) for one in every for part in one.parts for place in part.place.each}
    counts = Counter(name for name, _ in places)
    for number, parted in enumerate(every):
        scope, label = _scope(parted), functools.partial(_label, counts, number, parted)
        if not parted.is_cut:
            rules = {part.place.text for part in parted.parts if part.place.is_ruled}
            text = rules.pop() if len(rules) == 1 else ""
            only = parted.parts[0].place if len(parted.parts) == 1 else OUTSIDE
            key: Any = object() if only is OUTSIDE else (only, scope)
            regions: list[Region | None] = [None] * len(parted.names)
            schedule = schedule_of(parted.group)
            group = dict(parted.group)
            yield _Entry(
                label(only),
                key,
                group,
                _known_names(group, parted.names),
                text,
                schedule,
                [None] * len(regions),
                regions,
            )
        for part in parted.parts if parted.is_cut else ():
            inside = [parted.names[number] for number in part.numbers]
            found = [part.found.get(id(parameter)) for parameter in part.group["params"]]
            for at, place in enumerate(part.place.each):
                group = {key: part.group.get(key, value) for key, value in parted.group.items() if key != STEP_KEY}
                schedule = schedule_of(parted.group) if parted.is_ours else place.schedule
                if part.pulls:
                    group["weight_decay"] = parting.strength_of(part.pulls[at], parted)
                elif part.rule is not None:
                    group["weight_decay"] = parting.strength_of(part, parted)
                regions = [one.regions[at] if one is not None and part.pulls else None for one in found]
                text = place.text if place.is_ruled else ""
                key = object() if place is OUTSIDE else (place, scope)
                yield _Entry(
                    label(place), key, group, _known_names(group, inside), text, schedule, found, regions, place.rule
                )


def _starts(
    parting: Parting, optimizers: Sequence[Any], found: Iterable[Found | None], rule: DecayRule
) -> list[Tensor | None]:
    def start_of(one: Found) -> Tensor | None:
        known = (parting.starts.known(optimizer, one, rule) for optimizer in optimizers)
        return next((start for start in known if start is not None), None)

    return [None if one is None else start_of(one) for one in found]


def _scope(parted: Parted) -> Any:
    """What tells param groups apart: those that were built over decay groups are no one's but the rules'."""
    return NAMES_KEY if NAMES_KEY in parted.group else id(parted.group)


def _label(counts: Mapping[str, int], number: int, parted: Parted, place: Place) -> str:
    """What is stepped over is called after its decay group.

    Where that is in several param groups, their name or number is put in front. What is not cut has the name that it
    was given, or is called in the same way, or by its number.
    """
    given = parted.group.get("name")
    front = safe_name(str(number if given is None else given))
    places = [one for part in parted.parts for one in part.place.each]
    is_whole = not parted.is_cut or (parted.is_ours and len(places) == 1)
    if is_whole and (given is not None or len(places) != 1 or place is OUTSIDE):
        return front
    return place.group if counts[place.group] == 1 else f"{front}.{place.group}"


def _copy(group: Group, name: str, names: list[str]) -> Group:
    copied = {key: copy.copy(value) if isinstance(value, list) else value for key, value in group.items()}
    copied.pop(NAMES_KEY, None)
    return {**copied, "name": name, "param_names": list(names)}


def _known_names(group: Group, names: list[str]) -> list[str]:
    """The names of parameters in the model, or as far as these are not known those that the param group has."""
    given = group.get(NAMES_KEY) or group.get("param_names") or names
    if any(names):  # DeepSpeed has put others in the place of the parameters
        given = [own or other for own, other in zip(names, given)]
    return list(given)
