"""Which rules take which parameters, and which parts of them: a parameter is in one group, or in pieces in several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lightning_regdecay.groups.matching import Matcher, first_takers
from lightning_regdecay.groups.parameters import ModelParameter
from lightning_regdecay.groups.regions import Region, region_of, rest_of
from lightning_regdecay.rules.crossing import Pair, RuleSet
from lightning_regdecay.rules.selectors import Rule, equal_options
from lightning_regdecay.rules.toward import START


class Share(NamedTuple):
    """What one rule takes of a parameter."""

    taker: int | None
    """The number of the rule, None for what none takes."""
    region: Region | None = None
    """The part of the parameter, None for all of it."""


def shares_of(matchers: Sequence[Matcher], parameters: Iterable[ModelParameter]) -> list[tuple[Share, ...]]:
    """What the rules take of each parameter: all of it the first that takes it, or parts of it one after another.

    Raises:
        ValueError: for rules that do not fit a parameter, or that take parts which overlap.
    """
    parameters = list(parameters)
    takers = first_takers(matchers, parameters)
    if not any(matcher.rule.is_partial for matcher in matchers):
        return [(Share(taker),) for taker in takers]
    return [
        (Share(taker),)
        if taker is None or not matchers[taker].rule.is_partial
        else _parts_taken(matchers, parameter, taker)
        for taker, parameter in zip(takers, parameters)
    ]


def _parts_taken(matchers: Sequence[Matcher], parameter: ModelParameter, first: int) -> tuple[Share, ...]:
    """What the rules from the first one on take of a parameter.

    Parts that overlap are an error, as two rules that say so of one tensor by numbers seldom mean it; one that is
    optional takes what is left.
    """
    taken: dict[int, Region] = {}
    for number in range(first, len(matchers)):
        rule: Any = matchers[number].rule
        if number != first and not matchers[number].takes(parameter):
            continue
        left = rest_of(taken.values()) if taken else None
        if taken and left is None:
            break
        if not rule.is_partial:
            return _shares(taken, Share(number, left))
        region = region_of(rule, parameter)
        if region is None:
            continue
        for other, before in taken.items():
            if rule.optional:
                region = region.without(before)
            elif region.overlaps(before):
                raise ValueError(
                    f"{rule.KIND} {other + 1} {matchers[other].rule.selector_text!r} and {rule.KIND} {number + 1} "
                    f"{rule.selector_text!r} both take some of {parameter.name!r}: rows and blocks of one tensor may "
                    "not overlap"
                )
        if region.count:
            taken[number] = region
    left = rest_of(taken.values()) if taken else None
    return _shares(taken, Share(None, left) if left is not None or not taken else None)


def _shares(taken: Mapping[int, Region], rest: Share | None) -> tuple[Share, ...]:
    shares = [Share(number, region) for number, region in taken.items()]
    if rest is None and len(taken) == 1:
        return (Share(shares[0].taker),)  # all of it
    return tuple(shares if rest is None else [*shares, rest])


class Piece(NamedTuple):
    """What is in one group of a parameter."""

    pair: Pair
    """The groups of the rules that took it, which name the group."""
    region: Region | None = None
    """The part of the parameter, None for all of it."""


def pieces_of(rules: RuleSet, parameters: Iterable[ModelParameter]) -> list[tuple[Piece, ...]]:
    """The pieces of each parameter, in the order of the decay rules that took them: one, of all of it, for most.

    Raises:
        ValueError: for rules that do not fit a parameter, or that take parts which overlap.
    """
    parameters = list(parameters)
    shares = shares_of([Matcher(rule) for rule in rules.decay], parameters)
    return pieces_from(rules, parameters, shares, first_takers([Matcher(rule) for rule in rules.lr], parameters))


def pieces_from(
    rules: RuleSet,
    parameters: Iterable[ModelParameter],
    shares: Iterable[tuple[Share, ...]],
    lr_takers: Iterable[int | None],
) -> list[tuple[Piece, ...]]:
    """The same, of what the decay rules and the lr rules take of each parameter."""
    found = []
    for parameter, of_decay, lr_taker in zip(parameters, shares, lr_takers):
        front = _group(rules.lr, lr_taker)
        regions: dict[str | None, Region | None] = {}
        for share in of_decay:
            group = _group(rules.decay, share.taker)
            before = regions.get(group)
            both = before is not None and share.region is not None
            regions[group] = before.joined(share.region) if both else share.region  # type: ignore[union-attr,arg-type]
        pieces = tuple(Piece((group, front), region) for group, region in regions.items())
        if len(pieces) > 1:
            _check_agreement(rules, parameter, pieces)
        found.append(pieces if len(pieces) > 1 else (Piece(pieces[0].pair),))
    return found


def _check_agreement(rules: RuleSet, parameter: ModelParameter, pieces: Sequence[Piece]) -> None:
    """Raise where rules for pieces of a parameter want different things of the whole of it."""
    first, *others = (rules.treatments[piece.pair] for piece in pieces)
    for other in others:
        if first.lr_mult != other.lr_mult or not equal_options(first.options, other.options):
            raise ValueError(
                f"{parameter.name!r} is in parts in the groups {rules.names[first.pair]!r} and "
                f"{rules.names[other.pair]!r}, which differ in lr_mult or options, and these are of whole tensors; let "
                f"an lr rule set them for all of it: lr_rules={{{parameter.name!r}: …}}"
            )
    kept = {
        (treated.rule.toward_dtype, treated.rule.toward_device)
        for treated in (first, *others)
        if treated.rule is not None and treated.rule.start == START
    }
    if len(kept) > 1:
        raise ValueError(
            f"parts of {parameter.name!r} decay toward its start, which is kept once: give all of them the same "
            "toward_dtype and toward_device"
        )


def _group(rules: Sequence[Rule], taker: int | None) -> str | None:
    """The group of a rule that is told by its number, None where there is none."""
    return None if taker is None else str(rules[taker].group)
