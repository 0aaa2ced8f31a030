"""The parts of an optimizer that are decayed element by element, in a step of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from lightning_regdecay.optim.by_element import Lent, Pulled, decay
from lightning_regdecay.optim.parts import Part
from lightning_regdecay.optim.starts import Starts
from lightning_regdecay.optim.trial import kind_of


def is_skipped(optimizer: Any) -> bool:
    """Whether an optimizer is to skip the step, as GradScaler lets fused ones by ``found_inf``."""
    return bool(getattr(optimizer, "found_inf", None) or 0)


def decay_parts(optimizer: Any, parts: Iterable[Part], starts: Starts) -> list[Lent]:
    """Decay the weights of some parts, whose gradients are there.

    Args:
        optimizer: the one that steps.
        parts: of its param groups.
        starts: what weights are decayed toward.

    Returns:
        The gradients that are to be given back when the step is done.

    Raises:
        RuntimeError: for an optimizer that decays weights in another way, since options of its param groups were set.
    """
    lent = []
    for part in parts:
        kind = kind_of(optimizer, part.group)
        if kind is None:
            raise RuntimeError(CANNOT.format(group=part.place.group, kind=type(optimizer).__name__))
        maximize, scale = bool(part.group.get("maximize")), getattr(optimizer, "grad_scale", None)
        pulled = list(_pulled(optimizer, part, starts))
        lent += decay(pulled, kind, part.group.get("lr"), maximize=maximize, scale=scale)
    return lent


def _pulled(optimizer: Any, part: Part, starts: Starts) -> Iterator[tuple[Tensor, list[Pulled]]]:
    for parameter in part.group["params"]:
        found = part.found.get(id(parameter))
        if found is None or parameter.grad is None:
            continue
        pulls = []
        for pull, region in zip(part.pulls, found.regions):
            rule = pull.place.rule
            toward = rule is not None and rule.toward is not None
            start = starts.of(optimizer, parameter, found.name, rule) if toward else None  # type: ignore[arg-type]
            pulls.append(Pulled(pull.weight_decay, region, start))
        yield parameter, pulls


CANNOT = (
    "group {group!r} decays rows, blocks or toward a start, which {kind} cannot: it was tried, and its weight decay is "
    "neither λ·w added to the gradient nor weights multiplied by 1 - lr·λ before the step; use an optimizer such as "
    "AdamW or SGD"
)
