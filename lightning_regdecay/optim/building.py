"""An own optimizer: one that is built over decay groups, with a param group for each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_regdecay.groups.groups import NAMES_KEY, DecayGroup, DecayGroups
from lightning_regdecay.optim.checks import NO_WEIGHT_DECAY, check_decays, check_options
from lightning_regdecay.optim.in_force import own_strengths, room_of
from lightning_regdecay.optim.unnamed import same


def check_signature(build: Callable[..., Any], name: str, argument: str, value: Any) -> None:
    """Raise for a function of the user's that does not take its one argument.

    Args:
        build: the function.
        name: what it is called, and whose it is, such as ``"build_optimizer of LitModel"``.
        argument: the name of the argument.
        value: the argument.
    """
    try:
        inspect.signature(build).bind(value)
    except TypeError as error:
        method = name.partition(" ")[0]
        raise TypeError(
            f"{name} cannot be called with {argument} alone ({error}); define {method}(self, {argument}) there"
        ) from None
    except ValueError:  # of what is written in C nothing is known
        pass


def build_over(groups: DecayGroups, build_optimizer: Callable[..., Any]) -> Any:
    """The optimizer that is built over decay groups, if it decays weights by them.

    Args:
        groups: the decay groups.
        build_optimizer: makes an optimizer of param groups.

    Raises:
        TypeError: for what is no optimizer.
        ValueError: for an optimizer that knows no weight decay, is not over the groups, does not know their options, or
            has another λ than their rules.
    """
    own = groups.own_param_groups()
    param_groups = [asked for _, asked in own]
    try:
        optimizer = build_optimizer(param_groups)
    except ValueError as error:
        # torch's LBFGS (and those modelled on it) takes no groups at all, and says so in these words.
        if "per-parameter options" in str(error):
            raise ValueError(f"{NO_WEIGHT_DECAY.format(optimizer='the optimizer')} ({error})") from error
        raise
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"build_optimizer must return a torch.optim.Optimizer, got {optimizer!r}")
    kind = type(optimizer).__name__
    check_decays([optimizer])
    _name_groups(optimizer, param_groups)
    names = [asked["name"] for asked in param_groups]
    if [param_group.get("name") for param_group in optimizer.param_groups] != names:
        raise ValueError(
            f"{kind} was not built over the decay groups {names}; build_optimizer must pass on the param_groups "
            "that it is given"
        )
    check_options(optimizer, groups)
    _set_strengths(optimizer, own)
    return optimizer


def _name_groups(optimizer: Any, given: Sequence[Mapping[str, Any]]) -> None:
    """Name the param groups of an optimizer that takes no keys but its own, and sorts, as the reference of Muon."""
    own = optimizer.param_groups
    if len(own) != len(given):
        return
    for group, asked in zip(own, given):
        names = dict(zip(map(id, asked["params"]), asked[NAMES_KEY]))
        if len(group["params"]) != len(names) or any(id(parameter) not in names for parameter in group["params"]):
            return
        if "name" not in group:
            group.update({key: value for key, value in asked.items() if key not in group})
        if NAMES_KEY in group:
            group[NAMES_KEY] = [names[id(parameter)] for parameter in group["params"]]


def _set_strengths(optimizer: Any, groups: Sequence[tuple[DecayGroup | None, Mapping[str, Any]]]) -> None:
    """Have the λ of the rules in an optimizer over decay groups.

    Raises:
        ValueError: for an optimizer that was made with another.
    """
    known = own_strengths(optimizer)  # of one that the model keeps from fit to fit
    for (group, asked), own in zip(groups, optimizer.param_groups):
        if group is not None and group.rule is not None and group.rule.decay_mult is not None:
            if group.name not in known or known[group.name] != own.get("weight_decay"):
                own["weight_decay"] = group.rule.decay_mult * (own.get("weight_decay") or 0.0)
        elif room_of(optimizer) is None:
            for key in sorted(asked.keys() - {"params", "name", NAMES_KEY}):
                if not same(own.get(key), asked[key]):
                    raise ValueError(
                        f"group {asked['name']!r} has {key}={own.get(key)!r} in the {type(optimizer).__name__} that "
                        f"build_optimizer has made, and {asked[key]!r} by its rule; pass on the param_groups as they "
                        "are, and set that in the rules"
                    )
            own.setdefault(NAMES_KEY, asked[NAMES_KEY])
