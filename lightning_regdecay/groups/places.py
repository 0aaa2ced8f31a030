"""Where the rules put each parameter of a model as it stands, asked by the parameter itself."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from lightning_regdecay.groups.groups import DecayGroups
from lightning_regdecay.groups.matching import Matcher, first_takers
from lightning_regdecay.groups.parameters import model_parameters
from lightning_regdecay.rules.names import unique_name
from lightning_regdecay.rules.rules import DecayRule


@dataclass(frozen=True, eq=False)
class Place:
    """A decay group as parameters know it: one object per group, compared by identity.

    Args:
        group: the name of the group.
        rule: its rule, None for the group of what no rule takes.
        text: the selectors of its rules.
    """

    group: str
    rule: DecayRule | None
    text: str


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
        self.rules: Sequence[DecayRule] = groups.rules
        first = {str(rule.group): rule for rule in reversed(groups.rules)}
        self._default = unique_name("default", first)
        names = [*first, self._default]
        self.by_name = {name: Place(name, first.get(name), groups.text_of(name)) for name in names}

    def find(self, groups: DecayGroups | None = None) -> Finds:
        """All parameters that the model has now.

        Args:
            groups: decay groups that were just made, whose members stay in them, should a predicate change its mind.
        """
        module = self.module()
        if module is None:
            return {}
        taken = {id(p): group.name for group in groups or () for p in group.params.values()}
        every = model_parameters(module)
        asked = [p for p in every if id(p.parameter) not in taken]
        for p, taker in zip(asked, first_takers([Matcher(rule) for rule in self.rules], asked)):
            taken[id(p.parameter)] = self._default if taker is None else str(self.rules[taker].group)
        return {id(p.parameter): Found(p.parameter, self.by_name[taken[id(p.parameter)]], p.name) for p in every}
