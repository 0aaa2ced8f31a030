"""λ of each kind of schedule at one optimizer step. Knows schedules by their fields; see :class:`DecaySchedule`."""

from __future__ import annotations

import math
from typing import Any

_LEAST_LR = 1e-3
"""The part of its peak below which a schedule goes by an lr no further, as λ would grow without bound."""


def strength_at(schedule: Any, step: int, length: int | None, delay: int, lr: float, peak_lr: float) -> float:
    """λ of a schedule without stages.

    Args:
        schedule: the schedule.
        step: t, the optimizer steps done before it.
        length: T in optimizer steps.
        delay: D in optimizer steps.
        lr: the lr at this step.
        peak_lr: the peak of the lr.

    Raises:
        ValueError: for a schedule that has a length, where it is not given.
    """
    kind, start, end = schedule.schedule, schedule.start or 0.0, schedule.end or 0.0
    if kind == "constant":
        return float(start if step >= delay else 0.0)
    if kind == "follow_lr":
        power = 1.0 if schedule.power is None else schedule.power
        ratio = min(lr / peak_lr, 1.0)
        return float(start * (ratio if power == 1.0 else max(ratio, _LEAST_LR if power < 0 else 0.0) ** power))
    if kind == "per_step":
        return float(start / max(lr, _LEAST_LR * peak_lr))
    if length is None:
        raise ValueError(f"a {kind} schedule needs length, the optimizer steps that it goes over")
    if kind == "timescale":
        return 1 / (peak_lr * length)
    p = min(max((step - delay) / length, 0.0), 1.0)
    if p in (0.0, 1.0):
        return float(end if p else start)  # to the last bit
    if kind == "linear":
        return float(start + (end - start) * p)
    if kind == "cosine":
        return float(end + (start - end) * (1 + math.cos(math.pi * p)) / 2)
    return math.exp((1 - p) * math.log(start) + p * math.log(end))
