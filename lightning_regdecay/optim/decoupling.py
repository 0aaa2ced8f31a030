"""Whether an optimizer shrinks the weights beside the gradient step (decoupled), and whether it decays them at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import CodeType
from typing import Any, Literal, TypeAlias

import torch
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

Kind: TypeAlias = Literal["coupled", "decoupled"]
_COUPLED = (Adadelta, Adagrad, Adam, Adamax, ASGD, NAdam, RAdam, RMSprop, SGD)
_DECOUPLED = tuple(getattr(torch.optim, name) for name in ("AdamW", "Adafactor", "Muon") if hasattr(torch.optim, name))


def reads_option(optimizer: Any, option: str) -> bool:
    """Whether an optimizer knows an option of its param groups: in ``defaults``, or because its code speaks of it.

    Some take options in each group alone (the reference Muon with auxiliary Adam), or hand them on to an optimizer
    inside (``ZeroRedundancyOptimizer``).
    """
    if option in getattr(optimizer, "defaults", {}):
        return True
    classes = [cls for cls in type(optimizer).__mro__ if cls not in (Optimizer, object)]
    functions = [function for cls in classes for function in vars(cls).values()]
    codes = [code for function in functions if (code := _code_of(function)) is not None]
    return any(option in names for code in codes for names in _texts_in(code))


def _code_of(function: Any) -> CodeType | None:
    while hasattr(function, "__wrapped__"):  # torch and its decorators wrap `step`
        function = function.__wrapped__
    function = getattr(function, "__func__", function)
    return getattr(function, "__code__", None)


def _texts_in(code: CodeType) -> Iterator[tuple[Any, ...]]:
    yield code.co_consts
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _texts_in(constant)
        elif isinstance(constant, tuple):
            yield constant


def check_decoupled(optimizer: Any, group: Mapping[str, Any], name: str, schedule: str) -> None:
    """Raise where a step does not multiply the weights of a group by 1 - lr·λ beside the gradient step.

    Args:
        optimizer: the one that steps.
        group: its param group, with its options.
        name: what the group is called.
        schedule: the schedule that goes by lr·λ, ``"timescale"`` or ``"per_step"``.

    Raises:
        ValueError: for an optimizer that is coupled, or not known to be decoupled.
    """
    decoupled = is_decoupled(optimizer, group)
    kind = type(optimizer).__name__
    label = f"group {name!r} has a {'timescale' if schedule == 'timescale' else f'{schedule} schedule'}"
    if decoupled is None:
        raise ValueError(
            f"{label}, and whether {kind} decouples weight decay from the gradient could not be found out; give λ as a "
            "number"
        )
    if not decoupled:
        known = type(optimizer) in _COUPLED or "decoupled_weight_decay" in group
        why = (
            "it is coupled, so λ·w goes through the same moments as the gradient and"
            if known
            else "a step without a gradient does not multiply its weights by 1 - lr·λ, so"
        )
        what = (
            "the weights are no running average with the time scale 1/(lr·λ)"
            if schedule == "timescale"
            else "lr·λ is not the part of the weights that a step takes"
        )
        raise ValueError(
            f"{label}, which {kind} cannot have: {why} {what}; use a decoupled optimizer such as AdamW, or give λ as a "
            "number"
        )


def is_decoupled(optimizer: Any, group: Mapping[str, Any]) -> bool | None:
    """Whether an optimizer shrinks the weights beside the gradient step; None where that cannot be found out."""
    if "decoupled_weight_decay" in group:  # Adam, NAdam, RAdam
        return bool(group["decoupled_weight_decay"])
    if type(optimizer) in _COUPLED + _DECOUPLED:
        return type(optimizer) in _DECOUPLED
    # Of any other, two steps without a gradient tell: decoupled, they multiply a weight by 1 - lr·λ each.
    lr, decay = 0.125, 0.25
    options = {name: value for name, value in group.items() if name in optimizer.defaults}
    try:
        with torch.random.fork_rng(devices=[]):  # as some draw numbers in a step, which are the training's
            return _shrinks(optimizer, options, lr, decay)
    except Exception:  # of whatever kind the optimizer of others raises
        return None


def kind_of_torchs(optimizer: Any, group: Mapping[str, Any]) -> Kind | None:
    """How one of torch's own optimizers decays weights, None for those of others, and where it is not that simple.

    Adafactor takes the norm of the weights before it decays them.
    """
    if type(optimizer) not in (*_COUPLED, AdamW):
        return None
    return "decoupled" if is_decoupled(optimizer, group) else "coupled"


def _shrinks(optimizer: Any, options: dict[str, Any], lr: float, decay: float) -> bool:
    """Whether two steps of an optimizer like this one, without a gradient, multiply a weight by 1 - lr·λ each."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    twin = twin_of(optimizer, {**options, "params": [weight], "lr": lr, "weight_decay": decay})
    for _ in range(2):
        weight.grad = torch.zeros_like(weight)
        twin.step()
    return torch.allclose(weight, torch.full_like(weight, (1 - lr * decay) ** 2), rtol=1e-6)


def twin_of(optimizer: Any, group: dict[str, Any]) -> Any:
    """An optimizer like another, over one param group."""
    twin = type(optimizer)([group], lr=group["lr"])
    # What is no option of a param group, such as `weight_decouple` of adabelief-pytorch (0.2).
    kept = {name: value for name, value in vars(optimizer).items() if isinstance(value, (bool, int, float, str))}
    vars(twin).update({name: value for name, value in kept.items() if name in vars(twin)})
    return twin
