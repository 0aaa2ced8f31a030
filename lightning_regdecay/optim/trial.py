"""What an optimizer does with λ, found out by trial: whether decay beside it, element by element, is the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_regdecay.optim.by_element import Lent, Pulled, decay
from lightning_regdecay.optim.decoupling import Kind, twin_of
from lightning_regdecay.optim.registry import Registry

_LR, _DECAY, _STEPS = 0.125, 0.25, 3
_KINDS: tuple[Kind, ...] = ("coupled", "decoupled")
"""In this order, as SGD without momentum is both, and adds λ·w to the gradient."""
_known: Registry[dict[str, Kind | None]] = Registry()
"""What was found out of each optimizer, by the switches among the options of its param groups."""


def kind_of(optimizer: Any, group: Mapping[str, Any]) -> Kind | None:
    """How an optimizer decays the weights of a param group, None where decay beside it would not be the same.

    It is tried with small tensors: three steps with λ in the param group, and three with λ 0 there and the decay done
    beside it, coupled or decoupled, must end at the same weights.
    """
    options = {name: value for name, value in group.items() if name in getattr(optimizer, "defaults", {})}
    switches = {name: value for name, value in options.items() if value is None or isinstance(value, (bool, str))}
    known = _known.get(optimizer)
    if known is None:
        known = {}
        _known.set(optimizer, known)
    key = repr(sorted(switches.items()))
    if key not in known:
        known[key] = _tried(optimizer, options)
    return known[key]


def _tried(optimizer: Any, options: Mapping[str, Any]) -> Kind | None:
    if options.get("differentiable"):
        return None
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            expected = _trained(optimizer, options, None)
            for kind in _KINDS:
                for closure in (False, True):
                    if not torch.allclose(_trained(optimizer, options, kind, closure), expected, 1e-6, 1e-7):
                        break
                else:
                    return kind
    except Exception:  # of whatever kind the optimizer of others raises
        return None
    return None


def _trained(optimizer: Any, options: Mapping[str, Any], kind: Kind | None, closure: bool = False) -> Tensor:
    """A weight after some steps, decayed by the optimizer or, where the kind of that is given, beside it."""
    torch.manual_seed(0)  # of optimizers that draw numbers
    weight = torch.nn.Parameter(torch.linspace(-1.0, 2.0, 16, dtype=torch.float64).view(4, 4))
    group = {**options, "params": [weight], "lr": _LR, "weight_decay": 0.0 if kind else _DECAY}
    twin, lent, calls = twin_of(optimizer, group), list[Lent](), list[int]()

    def ready(step: int) -> None:
        weight.grad = torch.sin(torch.arange(16, dtype=torch.float64) * (step + 1)).view(4, 4)
        if kind is not None:
            maximize = bool(options.get("maximize"))
            lent.extend(decay([(weight, [Pulled(_DECAY)])], kind, _LR, maximize=maximize))

    def evaluate(step: int) -> Tensor:
        if step in calls:
            raise RuntimeError("the optimizer calls its closure several times in a step")
        calls.append(step)
        ready(step)
        return torch.tensor(1.0, dtype=torch.float64)

    for step in range(_STEPS):
        if closure:
            twin.step(lambda step=step: evaluate(step))
        else:
            ready(step)
            twin.step()
    if closure and len(calls) != _STEPS:
        raise RuntimeError("the optimizer does not call its closure")
    return weight.detach()
