"""What an optimizer does with λ, found out by trial: whether decay beside it, element by element, is the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_regdecay.optim.by_element import Lent, Pulled, decay
from lightning_regdecay.optim.decoupling import Kind, kind_of_torchs, twin_of
from lightning_regdecay.optim.registry import Registry

_LR, _DECAY = 0.125, 0.25
_STEPS = 40
"""Some wait, warm up or average for a dozen steps before they do what they do in the end."""
_LARGE, _ALONG = 7, 5
"""Every so many steps gradients are large, for those that clip, and at right angles to the weights, for those that
take a part of them away."""
_SAME, _LEAST = 1e-5, 1e-3
"""How far weights may be apart, of what decay changes in them; and how much of them that must be."""
_KINDS: tuple[Kind, ...] = ("coupled", "decoupled")
"""In this order, as SGD without momentum is both, and adds λ·w to the gradient."""
_known: Registry[dict[str, Kind | None]] = Registry()
"""What was found out of each optimizer, by the switches among the options of its param groups."""


def kind_of(optimizer: Any, group: Mapping[str, Any]) -> Kind | None:
    """How an optimizer decays the weights of a param group, None where decay beside it would not be the same.

    It is tried with small tensors: steps with λ in the param group, and as many with λ 0 there and the decay done
    beside it, coupled or decoupled, must end at the same weights, and elsewhere than without decay.
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
    of_torch = kind_of_torchs(optimizer, options)
    if of_torch is not None:
        return of_torch
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            shapes = _shapes(optimizer, options)
            expected, without = (_Run(optimizer, options, shapes, decay=decay).end() for decay in (_DECAY, 0.0))
            effect = _distance(expected, without)
            if not effect > _LEAST * _distance(without, [0 * one for one in without]):
                return None
            for kind in _KINDS:
                runs = [_Run(optimizer, options, shapes, kind=kind, closure=closure) for closure in (False, True)]
                if all(_distance(run.end(), expected) <= _SAME * effect for run in runs):
                    return kind if _skips_alike(optimizer, options, shapes, kind) else None
    except Exception:  # of whatever kind the optimizer of others raises
        return None
    return None


def _skips_alike(optimizer: Any, options: Mapping[str, Any], shapes: list[tuple[int, ...]], kind: Kind) -> bool:
    """Whether gradients that are no numbers leave the same behind, as some skip such a step."""
    runs = [_Run(optimizer, options, shapes, decay=_DECAY), _Run(optimizer, options, shapes, kind=kind)]
    ends = [run.end(steps=2, last=float("nan")) for run in runs]
    return all(torch.allclose(one, other, equal_nan=True) for one, other in zip(*ends))


def _shapes(optimizer: Any, options: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Of a matrix, and of a vector where the optimizer takes some."""
    every: list[tuple[int, ...]] = [(4, 4), (5,)]
    try:
        _Run(optimizer, options, every, decay=_DECAY).end(steps=1)
    except Exception:  # torch's Muon takes matrices alone
        return every[:1]
    return every


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float(torch.linalg.vector_norm(one - other)) for one, other in zip(a, b))


class _Run:
    """Some steps of an optimizer like another.

    Args:
        optimizer: the other one.
        options: of its param group.
        shapes: those of the weights.
        decay: λ in the param group.
        kind: as what decay is done beside it, None for not at all.
        closure: whether steps get a closure.
    """

    def __init__(
        self,
        optimizer: Any,
        options: Mapping[str, Any],
        shapes: list[tuple[int, ...]],
        *,
        decay: float = 0.0,
        kind: Kind | None = None,
        closure: bool = False,
    ) -> None:
        torch.manual_seed(0)  # of optimizers that draw numbers
        self.weights = [torch.nn.Parameter(_ramp(shape)) for shape in shapes]
        self.twin = twin_of(optimizer, {**options, "params": self.weights, "lr": _LR, "weight_decay": decay})
        self.kind, self.closure, self.maximize = kind, closure, bool(options.get("maximize"))
        self.calls: list[int] = []

    def end(self, steps: int = _STEPS, last: float = 1.0) -> list[Tensor]:
        """The weights after some steps, the gradients of the last of which are multiplied by a number."""
        for step in range(steps):
            factor = last if step == steps - 1 else 1e4 if step % _LARGE == _LARGE - 1 else 1.0
            if self.closure:
                self.twin.step(lambda step=step, factor=factor: self._evaluate(step, factor))
            else:
                self._ready(step, factor)
                self.twin.step()
        if self.closure and self.calls != list(range(steps)):
            raise RuntimeError("the optimizer does not call its closure once in a step")
        return [weight.detach() for weight in self.weights]

    def _evaluate(self, step: int, factor: float) -> Tensor:
        self.calls.append(step)
        self._ready(step, factor)
        return torch.tensor(1.0, dtype=torch.float64)

    def _ready(self, step: int, factor: float) -> None:
        for number, weight in enumerate(self.weights):
            gradient = torch.sin(_ramp(weight.shape) * (step + 3 + number) * 1.7) + 0.1
            if step % _ALONG == _ALONG - 1:
                own = weight.detach()
                gradient = gradient - own * (own * gradient).sum() / (own * own).sum()
            weight.grad = factor * gradient
        if self.kind is not None:
            pulled = [(weight, [Pulled(_DECAY)]) for weight in self.weights]
            decay(pulled, self.kind, _LR, list[Lent](), maximize=self.maximize)


def _ramp(shape: tuple[int, ...]) -> Tensor:
    size = int(torch.Size(shape).numel())
    return torch.linspace(-1.0, 2.0, size, dtype=torch.float64).view(shape)
