"""A schedule as a plot, and the way to matplotlib for all plots. Knows schedules only as what tells λ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from lightning_regdecay.rules.scalars import nonnegative_number, positive_number, whole_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Lr: TypeAlias = float | Sequence[float] | Callable[[int], float]

TIME = "time (optimizer steps)"
WEIGHT_DECAY = "weight decay λ"
_NEED_LR = ("follow_lr", "per_step", "timescale")
_MOST_POINTS = 2000


def pyplot() -> Any:
    """``matplotlib.pyplot``, which is an extra.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError:
        raise ModuleNotFoundError("plot() needs matplotlib: pip install matplotlib") from None
    return plt


def check_axes(ax: Any) -> None:
    """Raise for what is neither axes nor None."""
    if ax is not None and not hasattr(ax, "plot"):
        raise TypeError(f"ax must be matplotlib axes, got {ax!r}")


def plot_schedule(
    schedule: Any, steps: int, lr: Lr | None, epochs: float | None, ax: Axes | None
) -> tuple[Figure, Axes]:
    """Draw λ over a run, see :meth:`DecaySchedule.plot`."""
    count = whole_number("steps", steps, least=1)
    if count is None:
        raise TypeError("steps must be the optimizer steps of the run, got None")
    values = schedule_values(schedule, count, lr, epochs)
    plt = pyplot()
    check_axes(ax)
    if ax is None:
        _, ax = plt.subplots(figsize=(7, 3.5), layout="constrained")
        ax.set_title(schedule.text, fontsize="medium")
    times = sorted({*range(0, len(values), math.ceil(len(values) / _MOST_POINTS)), len(values) - 1})
    ax.plot(times, [values[t] for t in times], label=schedule.text, marker="o" if len(times) == 1 else None)
    ax.set_xlabel(TIME)
    ax.set_ylabel(WEIGHT_DECAY)
    ax.set_ylim(bottom=0, auto=None)  # and another schedule on the same axes finds its room
    ax.grid(alpha=0.3)
    return ax.figure, ax  # type: ignore[return-value]  # or the part of a figure that the axes are in


def schedule_values(schedule: Any, steps: int, lr: Lr | None, epochs: float | None) -> list[float]:
    """λ for each step of a run of so many."""
    epochs = positive_number("epochs", epochs)
    if epochs is None and any(part.epochs is not None or part.delay_epochs is not None for part in schedule.parts):
        raise ValueError(
            f"the schedule '{schedule.text}' has a time in epochs: pass how many the run has, plot({steps}, epochs=10)"
        )
    by_lr = [part for part in schedule.parts if part.schedule in _NEED_LR]
    for part in by_lr:
        if lr is None and not (part.schedule == "timescale" and part.peak_lr):
            raise ValueError(f"a {part.schedule} schedule goes by the lr: pass lr, a number, a list or a function")
    delay, length = schedule.in_steps(lambda: steps, lambda: steps / (epochs or 1.0))
    lrs = [1.0] * steps if lr is None else _lrs(lr, steps)
    highest = max(lrs)
    for part in by_lr:
        if not (part.peak_lr or highest):
            raise ValueError(f"the lr is never above 0, so a {part.schedule} schedule has no peak to go by")
    values = []
    for step, lr_now in enumerate(lrs):
        stage, since, own_length = schedule.stage_at(step, length)
        peak = stage.peak_lr or highest
        values.append(stage.value(since, length=own_length, delay=delay, lr=lr_now, peak_lr=peak))
    return values


def _lrs(lr: Lr, steps: int) -> list[float]:
    """The lr of each step."""
    if callable(lr):
        given: list[Any] = [lr(step) for step in range(steps)]
    else:
        given = list(lr) if isinstance(lr, Iterable) and not isinstance(lr, str) else [lr] * steps
    if len(given) < steps:
        raise ValueError(f"lr must have a value for each of the {steps} steps, got {len(given)}")
    return [_lr(value) for value in given[:steps]]


def _lr(value: Any) -> float:
    lr = nonnegative_number("lr", value.item() if hasattr(value, "item") else value)  # of tensors and arrays
    if lr is None:
        raise TypeError("lr must be a number at each step, got None")
    return lr
