"""What is in force in an optimizer, as others are to see it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lightning_regdecay.groups.groups import NAMES_KEY, TABLE_HEADER, table_row, total_row
from lightning_regdecay.groups.places import OUTSIDE
from lightning_regdecay.groups.tables import Table, Tabular
from lightning_regdecay.optim.parting import Parting
from lightning_regdecay.optim.parts import Part, Parted
from lightning_regdecay.optim.seen import Group
from lightning_regdecay.rules.names import safe_name, unique_name
from lightning_regdecay.rules.schedules import STEP_KEY, DecaySchedule, schedule_of


@dataclass(frozen=True)
class InForce:
    """A param group as the optimizer steps over it.

    Args:
        group: a copy of the param group or, where that is cut, of a part of it.
        text: the selectors of the rule that it is under, empty without one.
        schedule: the schedule of its λ.
    """

    group: Group
    text: str
    schedule: DecaySchedule | None


class ParamGroupsInForce(Tabular, list[dict[str, Any]]):
    """Param groups as an optimizer steps over them: a list of dictionaries that prints as a table."""

    def __init__(self, every: Iterable[InForce]) -> None:
        every = list(every)
        super().__init__(one.group for one in every)
        self._texts = [one.text for one in every]

    @property
    def table(self) -> Table:
        """The table, a row per group and one for all."""
        rows = [
            table_row(str(g["name"]), text or "-", g["params"], _shown(g.get("weight_decay")), _shown(g.get("lr")))
            for g, text in zip(self, self._texts)
        ]
        return Table(TABLE_HEADER, [*rows, total_row(p for group in self for p in group["params"])])


def _shown(value: Any) -> Any:
    return "-" if value is None or isinstance(value, (list, tuple)) else float(value)


def told(parting: Parting, groups: list[Group]) -> list[InForce]:
    """Param groups as the optimizer steps over them, computed from what they and the rules are now."""
    every = parting.seen(groups)
    found: list[InForce] = []
    for parted, names in zip(every, _names(every)):
        if parted.is_cut:
            for part, name in zip(parted.parts, names):
                text = part.place.text if part.place.is_ruled else ""
                schedule = part.schedule if parted.has_strengths else schedule_of(parted.group)
                names_inside = [parted.names[number] for number in part.numbers]
                found.append(InForce(_copy(_of_part(parting, part, parted), name, names_inside), text, schedule))
        else:
            rules = {part.place.text for part in parted.parts if part.place.is_ruled}
            text = rules.pop() if len(rules) == 1 else ""
            found.append(InForce(_copy(parted.group, names[0], parted.names), text, schedule_of(parted.group)))
    return found


def _of_part(parting: Parting, part: Part, parted: Parted) -> Group:
    group = {key: part.group.get(key, value) for key, value in parted.group.items() if key != STEP_KEY}
    if part.rule is not None:
        group["weight_decay"] = parting.strength_of(part, parted)
    return group


def _copy(group: Group, name: str, names: list[str]) -> Group:
    given = group.get(NAMES_KEY) or group.get("param_names") or names
    copied = {key: copy.copy(value) if isinstance(value, list) else value for key, value in group.items()}
    copied.pop(NAMES_KEY, None)
    if any(names):  # DeepSpeed has put others in the place of the parameters
        given = [own or other for own, other in zip(names, given)]
    return {**copied, "name": name, "param_names": list(given)}


def _names(every: list[Parted]) -> list[list[str]]:
    """The names of the parts of each param group, or one for a param group that is not cut.

    A part is called after its decay group; where that has parts in several param groups, their name or number is put in
    front. What is not cut has the name that it was given, or is called in the same way, or by its number.
    """
    counts = Counter(part.place.group for parted in every for part in parted.parts)
    taken: set[str] = set()
    found: list[list[str]] = []
    for number, parted in enumerate(every):
        given = parted.group.get("name")
        front = safe_name(str(number if given is None else given))
        places = [part.place for part in parted.parts]
        is_whole = not parted.is_cut or (parted.is_ours and len(places) == 1)
        if is_whole and (given is not None or len(places) != 1 or places[0] is OUTSIDE):
            labels = [front]
        else:
            labels = [p.group if counts[p.group] == 1 else f"{front}.{p.group}" for p in places]
        found.append([])
        for label in labels:
            found[-1].append(unique_name(label, taken))
            taken.add(found[-1][-1])
    return found
