"""Decay that no param group can say: of parts of tensors, and toward a start. It is done here, beside the optimizer.

The λ of the param group is 0 in the step, and right before the code of the optimizer, when gradients are clipped, each
element is decayed as that code would have: decoupled, w ← (1 - lr·λ)·w + lr·λ·w₀; coupled, g ← g + λ·(w - w₀). Which of
these it is, the optimizer is tried for; one that is neither is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_regdecay.groups.regions import Region, Selection, selection
from lightning_regdecay.groups.shards import local_part
from lightning_regdecay.optim.decoupling import Kind


class Pulled(NamedTuple):
    """Some elements of a parameter that are decayed with one λ."""

    weight_decay: float
    region: Region | None = None
    """Which they are, None for all."""
    start: Tensor | None = None
    """What this process holds of the weights that they are decayed toward, None for 0."""


class Lent(NamedTuple):
    """A gradient that stands in the place of another until the step is done."""

    parameter: Tensor
    own: Tensor
    gradient: Tensor
    scale: Any
    """What both are multiplied by until the optimizer has divided them by it, None for 1."""

    @torch.no_grad()
    def give_back(self, is_done: bool) -> None:
        """Put the other back.

        Args:
            is_done: whether the optimizer has stepped.
        """
        if self.parameter.grad is self.gradient:
            if is_done and self.scale is not None:
                self.own.div_(self.scale)
            self.parameter.grad = self.own


def check_gradients(parameters: Iterable[tuple[Tensor, Sequence[Pulled]]], kind: Kind) -> None:
    """Raise for sparse gradients that λ·w would be added to.

    Raises:
        RuntimeError: for these.
    """
    for parameter, _ in parameters:
        if kind == "coupled" and parameter.grad is not None and parameter.grad.layout != torch.strided:
            raise RuntimeError(
                "a sparse gradient takes no coupled weight decay by rows, blocks or toward a start; use a decoupled "
                "optimizer, or sparse=False"
            )


@torch.no_grad()
def decay(
    parameters: Iterable[tuple[Tensor, Sequence[Pulled]]],
    kind: Kind,
    lr: Any,
    lent: list[Lent],
    *,
    maximize: bool = False,
    scale: Any = None,
    foreach: bool = False,
) -> None:
    """Decay parameters that have a gradient, element by element.

    Args:
        parameters: each with what is to be decayed in it.
        kind: what the optimizer does with λ.
        lr: that of the step, a number or a tensor.
        lent: where gradients are put that are to be given back.
        maximize: whether the optimizer goes along the gradient, not against it.
        scale: what gradients are multiplied by until the optimizer has them, None for 1.
        foreach: whether the optimizer steps over lists of tensors.
    """
    for parameter, pulls in parameters:
        if parameter.grad is None or not any(pull.weight_decay for pull in pulls):
            continue
        weights = local_part(parameter if hasattr(parameter, "device_mesh") else parameter.detach())[0]
        target = weights
        if kind == "coupled":
            lent.append(Lent(parameter, parameter.grad, parameter.grad.clone(), scale))
            parameter.grad = lent[-1].gradient
            target = local_part(lent[-1].gradient)[0]
        for pull in pulls:
            if pull.weight_decay:
                where = selection(parameter, pull.region)
                if kind == "coupled":
                    factor = -pull.weight_decay if maximize else pull.weight_decay
                    _add(target, weights, where, factor if scale is None else factor * float(scale), pull.start)
                else:
                    _shrink(target, where, lr * pull.weight_decay, pull.start, foreach)


def _add(gradient: Tensor, weights: Tensor, where: Selection | None, factor: float, start: Tensor | None) -> None:
    """Do g ← g + λ·(w - w₀)."""
    others = [weights] if start is None else [weights, _beside(start, weights)]

    def act(gradient: Tensor, weights: Tensor, start: Tensor | None = None) -> None:
        gradient.add_(weights if start is None else weights - start, alpha=factor)

    _change(act, where, gradient, *others)


def _shrink(weights: Tensor, where: Selection | None, rate: Any, start: Tensor | None, foreach: bool) -> None:
    """Do w ← (1 - lr·λ)·w + lr·λ·w₀."""

    def act(weights: Tensor, start: Tensor | None = None) -> None:
        if foreach:
            torch._foreach_mul_([weights], 1 - rate)
        else:
            weights.mul_(1 - rate)
        if start is not None and isinstance(rate, Tensor):
            weights.add_(start.to(weights.dtype) * rate)
        elif start is not None:
            weights.add_(start, alpha=rate)

    _change(act, where, weights, *([] if start is None else [_beside(start, weights)]))


def _beside(start: Tensor, weights: Tensor) -> Tensor:
    return start.to(weights.device, non_blocking=True)


def _change(act: Any, where: Selection | None, tensor: Tensor, *others: Tensor) -> None:
    if where is None:
        act(tensor, *others)
    else:
        where.change(act, tensor, *others)
