"""Two sets of rules on one model: which parameters move, and from which λ to which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_regdecay.groups.groups import DecayGroup, DecayGroups, build_decay_groups
from lightning_regdecay.groups.patterns import name_patterns
from lightning_regdecay.groups.regions import Region
from lightning_regdecay.groups.rows import numel_of
from lightning_regdecay.groups.shards import original_shape
from lightning_regdecay.groups.tables import preformatted
from lightning_regdecay.rules.forms import DecayRules, LrRules
from lightning_regdecay.rules.selectors import equal_options

_MOST_PATTERNS = 12  # printed for one move


@dataclass(frozen=True, repr=False)
class Move:
    """The parameters that go from one group to another of a different λ, or of different options.

    Args:
        before: the group that they were in.
        after: the group that they come to.
        params: parameter name to parameter, in the order of the model.
        regions: by the name of a parameter, the part of it that moves, where that is not all of it.
        numel: the number of scalar parameters, of the whole parameters where they are sharded.
    """

    before: DecayGroup
    after: DecayGroup
    params: Mapping[str, nn.Parameter]
    regions: Mapping[str, Region] = field(default_factory=dict)
    numel: int = 0

    def __repr__(self) -> str:
        return f"Move({self.before.name!r} → {self.after.name!r}, {len(self.params)} tensors)"


@dataclass(frozen=True, repr=False)
class Comparison:
    """What other rules change for a model; prints as a table.

    Args:
        before: the groups by the first rules.
        after: the groups by the second rules.
        moves: what moves, none where the two mean the same.
    """

    before: DecayGroups
    after: DecayGroups
    moves: tuple[Move, ...]

    def __str__(self) -> str:
        everything = {name: parameter for group in self.before for name, parameter in group.params.items()}
        moved = {name for move in self.moves for name in move.params}
        tensors = f"{len(moved):,} of {len(everything):,} tensors move"
        numel = sum(move.numel for move in self.moves)
        lines = [f"{tensors}, {numel:,} of {numel_of(everything.values()):,} parameters"]
        for move in self.moves:
            size = f"{len(move.params):,} tensors, {move.numel:,} parameters"
            lines.append(f"{_group_text(move.before)} → {_group_text(move.after)}: {size}")
            parts: dict[str, list[str]] = {}
            for name in move.params:
                parts.setdefault(move.regions[name].text if name in move.regions else "", []).append(name)
            patterns = [f"{line} {text}".rstrip() for text, names in parts.items() for line in name_patterns(names)]
            lines += [f"  {pattern}" for pattern in patterns[:_MOST_PATTERNS]]
            if len(patterns) > _MOST_PATTERNS:
                lines.append(f"  … and {len(patterns) - _MOST_PATTERNS:,} lines more")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Comparison({len(self.moves)} moves)"

    def _repr_html_(self) -> str:
        """For notebooks."""
        return preformatted(str(self))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """For IPython."""
        printer.text(str(self))


def compare(
    module: nn.Module,
    before: DecayRules,
    after: DecayRules,
    *,
    lr_before: LrRules | None = None,
    lr_after: LrRules | None = None,
    strict: bool = True,
) -> Comparison:
    """Find the parameters of a model that other rules give another λ, another lr or other options.

    A parameter whose group has another name only does not move.

    Args:
        module: the model; on the meta device too.
        before: rules, as :func:`~lightning_regdecay.build_decay_groups` takes them.
        after: the other rules.
        lr_before: lr rules that cross the first ones.
        lr_after: lr rules that cross the others.
        strict: False turns the errors about rules that take nothing into warnings.

    Returns:
        What moves. It prints as a table, in which the numbers in names are put together: ``layers.[0-11].bias``.

    Raises:
        TypeError: for rules of an unknown form, or a module that is none.
        ValueError: for rules that do not fit the model.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4))
    >>> print(compare(model, {"*.bias": 0.0, "*": 0.05}, {"preset": "ndim", "weight_decay": 0.05}))
    2 of 8 tensors move, 8 of 56 parameters
    rest, weight_decay 0.05 → no_decay, weight_decay 0: 2 tensors, 8 parameters
      [1,3].weight  (2)
    """
    groups_before = build_decay_groups(module, before, lr_rules=lr_before, strict=strict)
    groups_after = build_decay_groups(module, after, lr_rules=lr_after, strict=strict)
    becomes: dict[str, list[DecayGroup]] = {}
    for group in groups_after:
        for name in group.params:
            becomes.setdefault(name, []).append(group)
    moves: list[Move] = []
    for group in groups_before:
        moves += _moves(group, groups_after, becomes)
    return Comparison(groups_before, groups_after, tuple(moves))


def _moves(group: DecayGroup, groups_after: DecayGroups, becomes: Mapping[str, Sequence[DecayGroup]]) -> Iterator[Move]:
    """What leaves a group.

    Args:
        group: the group.
        groups_after: those by the other rules.
        becomes: by the name of a parameter, those of them that it is in.
    """
    moved: dict[str, dict[str, nn.Parameter]] = {}
    regions: dict[str, dict[str, Region]] = {}
    sizes: dict[str, int] = {}
    for name, parameter in group.params.items():
        own = group.regions.get(name)
        for other in becomes[name]:
            region, size = _in_both(original_shape(parameter), own, other.regions.get(name))
            if size and not equal_options(_treatment(group), _treatment(other)):
                moved.setdefault(other.name, {})[name] = parameter
                sizes[other.name] = sizes.get(other.name, 0) + size
                if region is not None:
                    regions.setdefault(other.name, {})[name] = region
    for other in groups_after:
        if other.name in moved:
            yield Move(group, other, moved[other.name], regions.get(other.name, {}), sizes[other.name])


def _in_both(shape: torch.Size, a: Region | None, b: Region | None) -> tuple[Region | None, int]:
    """What two groups have in common of a parameter, None for all of it, and how many elements that are.

    Of regions along two dimensions, the first stands for what they have in common.
    """
    if a is None or b is None:
        region = a or b
        return region, shape.numel() if region is None else region.numel(shape)
    if a.dim == b.dim:
        both = a.common(b)
        return both, both.numel(shape)
    return a, a.numel(shape) // max(b.size, 1) * b.count


def _treatment(group: DecayGroup) -> Any:
    """What the optimizer does with a group; one of no rule keeps its own λ and lr, which is 1 times these."""
    rule, treatment = group.rule, group.treatment
    strength: Any = (None, 1.0) if rule is None else (rule.weight_decay, rule.decay_mult)
    if rule is not None and rule.toward is not None:
        strength = (*strength, rule.toward)
    lr_mult = 1.0 if treatment.lr_mult is None and "lr" not in treatment.options else treatment.lr_mult
    return strength, lr_mult, treatment.options


def _group_text(group: DecayGroup) -> str:
    treatment = group.treatment
    given = {"weight_decay": treatment.strength_text, **treatment.options}
    if treatment.lr_mult is not None:
        given["lr"] = treatment.lr_text
    return ", ".join([group.name, *(f"{name} {value}" for name, value in given.items())])
