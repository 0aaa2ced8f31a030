"""The figures that tell what λ does to a group: each with its formula, unit and source."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_regdecay.rules.names import hint

FIGURES = {
    "l2_norm": "‖w‖₂ over all elements (unit of the weights)",
    "penalty": "½·λ·‖w‖₂², toward a start ½·λ·‖w - w₀‖₂² (unit of the loss)",
    "weight_decay": "λ, as the optimizer holds it",
    "rms": "‖w‖₂/√n (unit of the weights), to compare groups and models of any size",
    "decay_per_step": "lr·λ now: the part of the weights that a step takes, or coupled the pull of λ·w at momentum 0",
    "half_life": "ln 2/(lr·λ) in steps, for decoupled optimizers: weights without gradients are halved in it",
    "equilibrium": "rms/√(lr/(2·λ)): 1 is where the norms of Adam-like decoupled optimizers come to rest",
    "grad_norm": "‖g‖₂ of the gradients that the step goes by, after clipping (unit of loss per weight)",
    "update_ratio": "‖Δw‖₂/‖w‖₂ of the step",
    "decay_share": "lr·λ·‖w‖₂/‖Δw‖₂ (of w - w₀ toward a start): decay beside the whole update of the step, decoupled",
    "angle": "the angle between w before and after the step, in radians",
    "equilibrium_angle": "√(2·lr·λ·(1-β₁)/(1+β₁)): the angle of a step where Adam-like norms are at rest, in radians",
    "distance": "‖w - w₀‖₂ of groups that decay toward a start (unit of the weights)",
    "largest": "the largest rms among the tensors of the group, which ``largest`` of the monitor names",
}
"""Every figure by its name, with what it is.

Where norms come to rest: Kosson et al. 2023, "Rotational Equilibrium", arXiv 2305.17212.
"""
DEFAULT = ("l2_norm", "penalty", "weight_decay")
OF_A_STEP = frozenset({"grad_norm", "update_ratio", "decay_share", "angle"})
"""Figures for which somebody must look on while the optimizer steps."""
OF_AN_UPDATE = frozenset({"update_ratio", "decay_share", "angle"})
"""Those for which the weights before the step are kept until it is done."""
ALL = "all"


@dataclass(frozen=True)
class Measured:
    """What was measured of a group, and what its optimizer does with it.

    Args:
        norm: ‖w‖₂.
        numel: the number of its elements.
        weight_decay: λ.
        lr: the lr of its steps, None for an optimizer without.
        is_decoupled: whether the optimizer shrinks weights beside the gradient step, None where that is not known.
        is_adam_like: whether it divides by the root of a mean square of gradients.
        beta: its β₁.
        before: ‖w‖₂ before the step that was looked at, None where none was.
        gradient: ‖g‖₂ of it.
        update: ‖Δw‖₂ of it.
        decay_of_step: lr·λ of it.
        largest: the largest rms among the tensors.
        distance: ‖w - w₀‖₂, None for what decays toward 0.
        distance_before: the same before the step that was looked at.
    """

    norm: float
    numel: int
    weight_decay: float
    lr: float | None = None
    is_decoupled: bool | None = None
    is_adam_like: bool = False
    beta: float | None = None
    before: float | None = None
    gradient: float | None = None
    update: float | None = None
    decay_of_step: float | None = None
    largest: float | None = None
    distance: float | None = None
    distance_before: float | None = None

    @property
    def rms(self) -> float:
        """‖w‖₂/√n."""
        return self.norm / math.sqrt(self.numel) if self.numel else 0.0

    @property
    def decay_per_step(self) -> float | None:
        """lr·λ."""
        return None if self.lr is None else self.lr * self.weight_decay


def chosen(figures: str | Iterable[str] | None) -> tuple[str, ...]:
    """The names of figures as users give them: some, ``"all"``, or None for the first three.

    Raises:
        TypeError: for what is no list of names.
        ValueError: for a name that no figure has.
    """
    if figures is None:
        return DEFAULT
    names: Any = (figures,) if isinstance(figures, str) else figures
    if isinstance(names, Iterable) and not isinstance(names, Mapping):
        names = tuple(names)
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"figures must be names of figures, or 'all', got {figures!r}; known are {', '.join(FIGURES)}")
    found: tuple[str, ...] = tuple(dict.fromkeys(names))
    if ALL in found:
        return tuple(FIGURES)
    for name in found:
        if name not in FIGURES:
            raise ValueError(f"unknown figure {name!r}; {hint(name, FIGURES)}")
    if not found:
        raise ValueError(f"figures is empty; known are {', '.join(FIGURES)}")
    return found


def figure(name: str, of: Measured) -> float | str | None:
    """One figure of a group.

    Args:
        name: the figure.
        of: what was measured.

    Returns:
        Its value; text that says why it does not apply to the group and its optimizer; None where it has no value at
        this moment (no step was looked at, or a norm of 0).
    """
    per_step = of.decay_per_step
    if name == "l2_norm":
        return of.norm
    if name == "penalty":
        # No decay is no penalty, also where the norm is infinite.
        pulled = of.norm if of.distance is None else of.distance
        return 0.5 * of.weight_decay * pulled**2 if of.weight_decay else 0.0
    if name == "weight_decay":
        return of.weight_decay
    if name == "rms":
        return of.rms
    if name == "largest":
        return of.largest
    if name == "distance":
        return of.distance
    if name == "grad_norm":
        return of.gradient
    if name == "update_ratio":
        return None if of.update is None or not of.before else of.update / of.before
    if name == "angle":
        return None if of.update is None or not of.before or not of.norm else angle(of.before, of.norm, of.update)
    if per_step is None:
        return "the optimizer has no lr"
    if name == "decay_per_step":
        return per_step
    if of.is_decoupled is None:
        return "whether the optimizer decouples weight decay from the gradient could not be found out"
    if not of.is_decoupled:
        return "a step without a gradient does not multiply weights by 1 - lr·λ: λ is coupled, or decays in another way"
    if name == "half_life":
        return math.log(2) / per_step if per_step > 0 else None
    if name == "decay_share":
        pulled_before = of.before if of.distance is None else of.distance_before
        known = of.update and pulled_before is not None and of.decay_of_step is not None
        return of.decay_of_step * pulled_before / of.update if known else None  # type: ignore[operator]
    if of.distance is not None:
        return "it decays toward a start, and where norms come to rest is known of decay toward 0 alone"
    if not of.is_adam_like:
        return "the optimizer is not like Adam, of which alone it is known where norms come to rest"
    if not per_step > 0:
        return None
    if name == "equilibrium":
        return of.rms / math.sqrt(float(of.lr or 0.0) / (2 * of.weight_decay))
    beta = of.beta or 0.0
    return math.sqrt(2 * per_step * (1 - beta) / (1 + beta))


def angle(before: float, after: float, update: float) -> float:
    """The angle between two vectors of known norms with a difference of known norm, in radians.

    By the half angle, as a cosine near 1 has lost it: ‖Δ‖² = (‖a‖ - ‖b‖)² + 4·‖a‖·‖b‖·sin²(θ/2). Where all of
    the difference is one of length, norms that are right to 1e-7 leave an angle of up to √(2·10⁻⁷·‖Δ‖/‖a‖).

    >>> angle(1.0, 1.0, 2**0.5), angle(3.0, 4.0, 1.0)
    (1.5707963267948968, 0.0)
    """
    square = (update * update - (before - after) ** 2) / (4 * before * after)
    return 2 * math.asin(math.sqrt(min(max(square, 0.0), 1.0)))
