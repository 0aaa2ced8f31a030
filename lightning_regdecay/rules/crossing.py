"""Decay rules and lr rules that cross: a group is what one rule of each kind has taken. Knows no model."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from lightning_regdecay.rules.forms import DecayRules, LrRules, parse_lr_rules, parse_rules, plain_rules
from lightning_regdecay.rules.names import safe_name, unique_name
from lightning_regdecay.rules.rules import OWN, DecayRule, LrRule
from lightning_regdecay.rules.selectors import Rule

_LONGEST = 40

Pair: TypeAlias = tuple[str | None, str | None]
"""The group of a decay rule and that of an lr rule; None where no rule has taken a parameter."""


@dataclass(frozen=True)
class Treatment:
    """What becomes of the parameters that two rules have taken.

    Args:
        rule: the decay rule, None where none has.
        lr_rule: the lr rule, None where none has.
    """

    rule: DecayRule | None = None
    lr_rule: LrRule | None = None

    @property
    def pair(self) -> Pair:
        """The groups of the two rules."""
        return None if self.rule is None else self.rule.group, None if self.lr_rule is None else self.lr_rule.group

    @property
    def lr_mult(self) -> float | None:
        """The factor on the lr of each step, None where the lr is as it is."""
        given = [rule.lr_mult for rule in (self.rule, self.lr_rule) if rule is not None and rule.lr_mult is not None]
        return given[0] if given else None

    @property
    def options(self) -> dict[str, Any]:
        """Other options of the optimizer, ``lr`` among them where it is given as such."""
        of_decay = {} if self.rule is None else dict(self.rule.options)
        return of_decay if self.lr_rule is None else {**of_decay, **self.lr_rule.all_options}

    @property
    def strength_text(self) -> str:
        """λ in words that fit a table cell."""
        return OWN if self.rule is None else self.rule.strength_text

    @property
    def lr_text(self) -> str:
        """The lr in words that fit a table cell."""
        lr = self.options.get("lr")
        if lr is not None:
            return f"{float(lr):g}"
        return OWN if self.lr_mult is None else f"{self.lr_mult:g} x {OWN}"

    def check(self) -> None:
        """Raise for rules that set the same thing.

        Raises:
            ValueError: for these, and for a timescale beside an lr of 0.
        """
        if self.rule is None or self.lr_rule is None:
            return
        of_decay, of_lr = set(self.rule.options), set(self.lr_rule.all_options)
        of_decay |= {"lr"} if self.rule.lr_mult is not None else set()
        of_lr |= {"lr"} if self.lr_rule.lr_mult is not None else set()
        label = f"the decay rule {self.rule.selector_text!r} and the lr rule {self.lr_rule.selector_text!r}"
        for name in sorted(of_decay & of_lr):
            raise ValueError(f"{label} have parameters in common, and both set {name}; let one of them do it")
        kind = getattr(self.rule.weight_decay, "of_lr_times_lambda", None)
        if self.lr_mult == 0 and kind is not None:
            raise ValueError(f"{label} have parameters in common: a {kind} divides by the lr, and lr_mult is 0")


@dataclass(frozen=True)
class RuleSet:
    """The rules for a model, of both kinds, in order.

    Args:
        decay: the decay rules.
        lr: the lr rules.
    """

    decay: tuple[DecayRule, ...]
    lr: tuple[LrRule, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.decay or self.lr)

    @property
    def default(self) -> str:
        """The name of the group of what no decay rule takes."""
        return unique_name("default", [str(rule.group) for rule in self.decay])

    @functools.cached_property
    def names(self) -> Mapping[Pair, str]:
        """The name of every group that there can be, by the groups of its rules, in order.

        >>> RuleSet(parse_rules({"*.bias": 0.0}), parse_lr_rules({"head.*": 1e-3})).names
        {('bias', 'head'): 'head.bias', ('bias', None): 'bias', (None, 'head'): 'head.default', (None, None): 'default'}
        """
        decay = dict.fromkeys(str(rule.group) for rule in self.decay)
        lr = dict.fromkeys(str(rule.group) for rule in self.lr)
        alone: dict[str | None, str] = {name: name for name in decay}
        alone[None] = self.default
        taken = set(alone.values())
        names: dict[Pair, str] = {}
        for (group, name), front in itertools.product(alone.items(), [*lr, None]):
            crossed = name if front is None else unique_name(safe_name(f"{front}.{name}"), taken)
            names[group, front] = crossed
            taken.add(crossed)
        return names

    @functools.cached_property
    def treatments(self) -> Mapping[Pair, Treatment]:
        """What becomes of the parameters of every group that there can be; of rules that share one, the first."""
        decay: dict[str | None, DecayRule] = {rule.group: rule for rule in reversed(self.decay)}
        lr: dict[str | None, LrRule] = {rule.group: rule for rule in reversed(self.lr)}
        return {(d, r): Treatment(decay.get(d), lr.get(r)) for d, r in self.names}

    def text_of(self, pair: Pair) -> str:
        """The selectors of the rules that a group is made of, for a table; long ones are cut."""
        decay, lr = (
            _text([rule for rule in rules if rule.group == name]) for name, rules in zip(pair, (self.decay, self.lr))
        )
        return f"{decay or '(no rule)'} x {lr}" if lr else decay or "(no rule)"


def _text(rules: Sequence[Rule]) -> str:
    """The selectors of the rules of a group, which are cut, and what they take of each tensor, which is not."""
    parts = list(dict.fromkeys(rule.part_text for rule in rules if rule.part_text))
    text = shortened(" ; ".join(rule.selectors_text for rule in rules))
    return f"{text} {parts[0]}{' …' if len(parts) > 1 else ''}" if parts else text


def shortened(text: str) -> str:
    """A text that fits a table cell."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 2]} …"


class GivenRules(NamedTuple):
    """The rules for a model in the forms that they were given in, None for a kind that was not."""

    decay_rules: DecayRules | None
    lr_rules: LrRules | None = None

    def __bool__(self) -> bool:
        return self.decay_rules is not None or self.lr_rules is not None

    def parsed(self) -> RuleSet:
        """The rules as objects."""
        return parse_rule_set(self.decay_rules, self.lr_rules)

    def plain(self) -> dict[str, Any]:
        """As plain data, presets as what they stand for, for a checkpoint."""
        rules = self.parsed()
        return {"decay_rules": plain_rules(rules.decay), **({"lr_rules": plain_rules(rules.lr)} if rules.lr else {})}


def parse_rule_set(decay_rules: DecayRules | None, lr_rules: LrRules | None = None) -> RuleSet:
    """The rules of both kinds, in any form that users write; beside lr rules there may be no others.

    Raises:
        TypeError: for a form or a field that is not one of these.
        ValueError: for a value out of range, or rules of one group that disagree.
    """
    decay: Any = {} if decay_rules is None and lr_rules is not None else decay_rules
    return RuleSet(parse_rules(decay), parse_lr_rules(lr_rules))
