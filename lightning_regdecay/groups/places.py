"""Where the rules put each parameter of a model as it stands, asked by the parameter itself."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_regdecay.groups.groups import DecayGroups, together
from lightning_regdecay.groups.parameters import model_parameters
from lightning_regdecay.groups.pieces import pieces_of
from lightning_regdecay.groups.regions import Region
from lightning_regdecay.rules.crossing import Pair
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
        pieces: of tensors that are in several groups the places of their pieces; none for whole tensors.
    """

    group: str
    rule: DecayRule | None
    text: str
    lr_mult: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    pieces: tuple[Place, ...] = ()

    @property
    def each(self) -> tuple[Place, ...]:
        """The places of its pieces, or itself."""
        return self.pieces or (self,)

    @property
    def is_by_element(self) -> bool:
        """Whether λ is not one number times the weights of a tensor, as a param group has it."""
        return bool(self.pieces) or (self.rule is not None and self.rule.toward is not None)

    @property
    def is_ruled(self) -> bool:
        """Whether a step is another with its rules than without."""
        return self.rule is not None or self.lr_mult is not None or bool(self.pieces)

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
    regions: tuple[Region | None, ...] = (None,)
    """The part of it that is in each place of its pieces."""
    names: tuple[str, ...] = ()
    """All that it has in the model, where it is tied."""


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
        self._together: dict[tuple[Pair, ...], Place] = {}
        self.by_name = {place.group: place for place in self._by_pair.values()}
        for pairs in groups.together:
            self._place_of(pairs)

    def find(self, groups: DecayGroups | None = None) -> Finds:
        """All parameters that the model has now.

        Args:
            groups: decay groups that were just made, whose members stay in them, should a predicate change its mind.
        """
        module = self.module()
        if module is None:
            return {}
        cut = {} if groups is None else groups.cut
        known = {id(p): self.by_name[group.name] for group in groups or () for p in group.params.values()}
        every = model_parameters(module)
        asked = [p for p in every if id(p.parameter) not in known]
        pieces = dict(zip((p.name for p in asked), pieces_of(self.rules, asked)))
        found = {}
        for p in every:
            own = cut.get(p.name) if id(p.parameter) in known else pieces[p.name]
            if own is None:
                found[id(p.parameter)] = Found(p.parameter, known[id(p.parameter)], p.name, names=tuple(p.names))
            else:
                place = self._place_of(tuple(piece.pair for piece in own))
                regions = tuple(piece.region for piece in own)
                found[id(p.parameter)] = Found(p.parameter, place, p.name, regions, tuple(p.names))
        return found

    def _place_of(self, pairs: tuple[Pair, ...]) -> Place:
        """The place of parameters that are in one group, or have pieces in several."""
        if len(pairs) == 1:
            return self._by_pair[pairs[0]]
        if pairs not in self._together:
            pieces = tuple(self._by_pair[pair] for pair in pairs)
            name = together(self.rules, pairs, self.by_name)
            text = " + ".join(piece.group for piece in pieces)
            place = Place(name, None, text, pieces[0].lr_mult, pieces[0].options, pieces)
            self._together[pairs] = self.by_name[name] = place
        return self._together[pairs]
