"""Where the rules put each parameter of a model as it stands, asked by the parameter itself."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_regdecay.groups.groups import DecayGroups
from lightning_regdecay.groups.matching import taking_groups
from lightning_regdecay.groups.parameters import model_parameters
from lightning_regdecay.rules.rules import DecayRule
from lightning_regdecay.rules.schedules import DecaySchedule


@dataclass(frozen=True, eq=False)
class Place:
    """A decay group as parameters know it: one object per group, compared by identity.

    Args:
        group: the name of the group.
        rule: its decay rule, None for the group of what none takes.
        text: the selectors of its rules.
        lr_mult: the factor on the lr of each step, None where the lr is as it is.
        options: other options of its rules.
    """

    group: str
    rule: DecayRule | None
    text: str
    lr_mult: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_ruled(self) -> bool:
        """Whether a step is another with its rules than without."""
        return self.rule is not None or self.lr_mult is not None

    @property
    def schedule(self) -> DecaySchedule | None:
        """The schedule of λ, where the rule has one."""
        strength = None if self.rule is None else self.rule.weight_decay
        return strength if isinstance(strength, DecaySchedule) else None


OUTSIDE = Place("other", None, "")
"""Where parameters are that no model here has."""


class Found(NamedTuple):
    """A parameter of a model, and its place."""

    parameter: Tensor
    place: Place
    name: str
    """In the model."""


Finds = dict[int, Found]
"""By the id of the parameter. To be used at once: it keeps the parameters alive."""


class Places:
    """The places that rules have for the parameters of a model, frozen ones included. Does not keep the model alive.

    Args:
        module: the model.
        groups: its decay groups.
    """

    def __init__(self, module: nn.Module, groups: DecayGroups) -> None:
        self.module = weakref.ref(module)
        self.rules = groups.rule_set
        self._by_pair = {
            pair: Place(name, treated.rule, self.rules.text_of(pair), treated.lr_mult, treated.options)
            for (pair, name), treated in zip(self.rules.names.items(), self.rules.treatments.values())
        }
        self.by_name = {place.group: place for place in self._by_pair.values()}

    def find(self, groups: DecayGroups | None = None) -> Finds:
        """All parameters that the model has now.

        Args:
            groups: decay groups that were just made, whose members stay in them, should a predicate change its mind.
        """
        module = self.module()
        if module is None:
            return {}
        places = {id(p): self.by_name[group.name] for group in groups or () for p in group.params.values()}
        every = model_parameters(module)
        asked = [p for p in every if id(p.parameter) not in places]
        takers = [taking_groups(rules, asked) for rules in (self.rules.decay, self.rules.lr)]
        places |= {id(p.parameter): self._by_pair[pair] for p, pair in zip(asked, zip(*takers))}
        return {id(p.parameter): Found(p.parameter, places[id(p.parameter)], p.name) for p in every}
