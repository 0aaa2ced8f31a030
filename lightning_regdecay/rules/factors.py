"""λ of one group as a factor times that of another, worked out when rules are parsed: all after it see a plain λ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_regdecay.rules.names import hint, name_of_pattern, safe_name
from lightning_regdecay.rules.rules import DecayRule
from lightning_regdecay.rules.schedules import DecaySchedule
from lightning_regdecay.rules.stages import LENGTHS


def resolved(rules: Sequence[DecayRule]) -> list[DecayRule]:
    """The rules, those with ``of`` with the λ that they mean.

    Args:
        rules: of one rule set, each with its group.

    Raises:
        ValueError: for a group that no rule has, groups that go by each other, and a λ that has no such multiple.
    """
    first = {rule.group: rule for rule in reversed(rules)}
    found = []
    for number, rule in enumerate(rules, start=1):
        try:
            found.append(_resolved(rule, first))
        except ValueError as error:
            raise ValueError(f"decay rule {number} {rule.selector_text!r}: {error}") from None
    return found


def scaled(strength: float | DecaySchedule, factor: float) -> float | DecaySchedule:
    """A λ times a factor: the number, start and end of a schedule, the λ of each stage, 1/T of a timescale.

    Raises:
        ValueError: for a timescale of steps that would be no whole number of them.

    >>> scaled(DecaySchedule("cosine", 0.04, 0.4), 0.5), scaled(DecaySchedule("timescale", epochs=10), 0.5)
    (DecaySchedule('cosine', 0.02, 0.2), DecaySchedule('timescale', epochs=20.0))
    """
    if not isinstance(strength, DecaySchedule):
        return factor * strength
    if factor == 0.0:
        return 0.0
    if strength.stages is not None:
        return replace(strength, stages=[_scaled(stage, factor) for stage in strength.parts])
    return _scaled(strength, factor)


def _resolved(rule: DecayRule, first: Mapping[str | None, DecayRule]) -> DecayRule:
    """A rule that goes by no other group: along the groups that it goes by, to the one with a λ."""
    if rule.of is None:
        return rule
    factor, path, at = 1.0, [rule.group], rule
    while at.of is not None:
        factor *= at.decay_mult or 0.0
        group = safe_name(at.of)
        if group in path:
            raise ValueError(_round([*path, group]))
        if group not in first:
            raise ValueError(_unknown(at.of, [str(name) for name in first if name not in path]))
        path.append(group)
        at = first[group]
    if at.decay_mult is not None:
        return replace(rule, decay_mult=factor * at.decay_mult, of=None)
    return replace(rule, weight_decay=scaled(at.weight_decay or 0.0, factor), decay_mult=None, of=None)


def _round(path: Sequence[str | None]) -> str:
    if len(path) == 2:
        return f"of={path[0]!r} is the rule's own group; name another, or leave it out for the optimizer's own λ"
    names = " of ".join(map(repr, path))
    return f"decay_mult goes round in a circle, {names}; give one of these groups a λ of its own, weight_decay"


def _unknown(name: str, known: Sequence[str]) -> str:
    by_pattern = name_of_pattern(name)
    nearest = f"did you mean {by_pattern!r}?" if by_pattern in known else hint(name, known)
    if not known:
        nearest = "there is no other"
    return (
        f"of={name!r} is no group of these rules; {nearest}; without of, decay_mult is a factor on the optimizer's own"
    )


def _scaled(schedule: DecaySchedule, factor: float) -> DecaySchedule:
    fields = LENGTHS if schedule.schedule == "timescale" else ("start", "end")
    changed: dict[str, Any] = {name: value for name in fields if (value := getattr(schedule, name)) is not None}
    for name, value in changed.items():
        changed[name] = _longer(name, value, factor) if name in LENGTHS else factor * value
    return replace(schedule, **changed)


def _longer(name: str, length: float, factor: float) -> float:
    longer = length / factor
    if name != "steps":
        return longer
    whole = round(longer)
    if whole < 1 or not math.isclose(whole, longer, rel_tol=1e-9):
        raise ValueError(
            f"a timescale of {length:g} steps at {factor:g} of its λ is one of {longer:g}, and steps are whole; give "
            "the timescale in epochs or as a fraction of the run"
        )
    return whole
