"""The rules for one model in an optimizer, and param groups that were built by them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_regdecay.groups.groups import NAMES_KEY
from lightning_regdecay.groups.places import Place, Places


@dataclass(frozen=True)
class Layer:
    """The rules for one model in an optimizer.

    Args:
        places: where they put its parameters.
        own: λ of each param group, by its name, that was built as decay group of these rules.
        by_user: whether the user has put them there, not a fit.
        built: other options of each param group, by its name, that was built as decay group.
    """

    places: Places
    own: Mapping[str, Any] = field(default_factory=dict)
    by_user: bool = True
    built: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def is_own(group: Mapping[str, Any], places: Places) -> bool:
    """Whether a param group was built as decay group of some rules."""
    return own_place(group, places) is not None


def built_options(group: Mapping[str, Any], layers: Iterable[Layer], places: Places) -> Mapping[str, Any]:
    """Other options that a param group was built with by rules, now or before; none for one that was not.

    Args:
        group: the param group.
        layers: the rules that are in force in its optimizer.
        places: of the rules that are to be.
    """
    if NAMES_KEY not in group:
        return {}
    name = str(group.get("name"))
    known = [layer.built[name] for layer in layers if name in layer.built]
    place = places.by_name.get(name)
    return known[0] if known else {} if place is None else place.options


def own_place(group: Mapping[str, Any], places: Places) -> Place | None:
    """The place of a param group that was built as decay group, by its name and the names of its members."""
    return places.by_name.get(str(group.get("name"))) if NAMES_KEY in group else None
