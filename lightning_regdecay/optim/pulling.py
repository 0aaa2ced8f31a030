"""The parts of an optimizer that are decayed element by element, in a step of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from lightning_regdecay.optim.by_element import Lent, Pulled, check_gradients, decay
from lightning_regdecay.optim.parts import Part
from lightning_regdecay.optim.starts import Starts
from lightning_regdecay.optim.trial import kind_of


def is_skipped(optimizer: Any) -> bool:
    """Whether an optimizer is to skip the step, as GradScaler lets fused ones by ``found_inf``."""
    return bool(getattr(optimizer, "found_inf", None) or 0)


def decay_parts(optimizer: Any, parts: Iterable[Part], starts: Starts, lent: list[Lent]) -> None:
    """Decay the weights of some parts, whose gradients are there.

    Args:
        optimizer: the one that steps.
        parts: of its param groups.
        starts: what weights are decayed toward.
        lent: where gradients are put that are to be given back when the step is done.

    Raises:
        RuntimeError: for an optimizer that decays weights in another way, since options of its param groups were set,
            and for sparse gradients where it is coupled.
        ValueError: for a start that does not fit its parameter. Nothing has moved then.
    """
    plans = []
    for part in parts:
        kind = kind_of(optimizer, part.group)
        if kind is None:
            raise RuntimeError(CANNOT.format(group=part.place.group, kind=type(optimizer).__name__))
        pulled = list(_pulled(optimizer, part, starts))
        check_gradients(pulled, kind)
        plans.append((part.group, pulled, kind))
    for group, pulled, kind in plans:
        decay(
            pulled,
            kind,
            group.get("lr"),
            lent,
            maximize=bool(group.get("maximize")),
            scale=getattr(optimizer, "grad_scale", None),
            foreach=_uses_foreach(group, pulled),
        )


def _pulled(optimizer: Any, part: Part, starts: Starts) -> Iterator[tuple[Tensor, list[Pulled]]]:
    for parameter in part.group["params"]:
        found = part.found.get(id(parameter))
        if found is None or parameter.grad is None:
            continue
        pulls = []
        for pull, region in zip(part.pulls, found.regions):
            rule = pull.place.rule
            start = None if rule is None or rule.toward is None else starts.of(optimizer, found, rule)
            pulls.append(Pulled(pull.weight_decay, region, start))
        yield parameter, pulls


def _uses_foreach(group: Mapping[str, Any], pulled: Sequence[tuple[Tensor, Any]]) -> bool:
    """Whether the optimizer steps over lists of tensors, which rounds half types in another way."""
    if group.get("foreach") is not None or group.get("fused") or "foreach" not in group:
        return bool(group.get("foreach"))
    return all(parameter.device.type == "cuda" and type(parameter) in (Tensor, Parameter) for parameter, _ in pulled)


CANNOT = (
    "group {group!r} decays rows, blocks or toward a start, which {kind} cannot: it was tried, and its weight decay is "
    "neither λ·w added to the gradient nor weights multiplied by 1 - lr·λ before the step; use an optimizer such as "
    "AdamW or SGD"
)
UNDER_DEEPSPEED = (
    "DeepSpeed steps parameters of its own, so that rules for rows and blocks of tensors, and those that decay toward "
    "a start, cannot be in force; give whole tensors a λ, as in {'*': 0.05}"
)
