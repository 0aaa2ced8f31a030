"""λ over time: what a schedule is, and how a param group holds it. Knows no rules, no model and no optimizer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from lightning_regdecay.rules.names import hint
from lightning_regdecay.rules.plots import Lr, plot_schedule
from lightning_regdecay.rules.scalars import finite_number, nonnegative_number, positive_number, whole_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Kind = Literal["constant", "linear", "cosine", "exponential", "follow_lr", "per_step", "timescale"]

SCHEDULE_KEY = "decay_schedule"
"""Where a param group holds the fields of its schedule, as plain data."""
STEP_KEY = "decay_step"
"""Where a param group counts the optimizer steps that it has done, so that every checkpoint of an optimizer has it."""
STRENGTH_KEYS = {"weight_decay", SCHEDULE_KEY, STEP_KEY}
"""All that a param group holds of its λ."""
PEAK_KEY = "decay_peak_lr"
"""Where a param group with a schedule notes the peak of its lr, which goes on with the lr in a resumed run."""
LR_MULT_KEY = "decay_lr_mult"
"""Where a param group notes the factor of a rule that its lr has in it already."""
_LENGTHS = ("steps", "epochs")
_DELAYS = ("delay_steps", "delay_epochs")
FIELDS: dict[str, tuple[str, ...]] = {
    "constant": ("start", *_DELAYS),
    "linear": ("start", "end", *_LENGTHS, *_DELAYS),
    "cosine": ("start", "end", *_LENGTHS, *_DELAYS),
    "exponential": ("start", "end", *_LENGTHS, *_DELAYS),
    "follow_lr": ("start", "power", "peak_lr"),
    "per_step": ("start", "peak_lr"),
    "timescale": (*_LENGTHS, "fraction", "peak_lr"),
}
"""The fields of each kind of schedule."""
OF_LR_TIMES_LAMBDA = frozenset({"per_step", "timescale"})
"""Those that say what lr·λ is to be: for decoupled optimizers, and by the lr that is stepped with."""
_LEAST_LR = 1e-3
"""The part of its peak below which a schedule goes by an lr no further, as λ would grow without bound."""


@dataclass(frozen=True, repr=False)
class DecaySchedule:
    r"""A weight decay that changes while training.

    With t the optimizer steps done so far, D the delay, T the length, all in optimizer steps, and
    p = min(max((t - D) / T, 0), 1):

    ============= ==========================================================
    constant      λ = start from t = D on, 0 before
    linear        λ = start + (end - start) · p
    cosine        λ = end + (start - end) · (1 + cos πp) / 2
    exponential   λ = start · (end / start)^p
    follow_lr     λ = start · (min(lr / peak lr, 1))^power; power is 1 if not given
    per_step      λ = start / lr, for decoupled optimizers
    timescale     λ = 1 / (peak lr · T), for decoupled optimizers
    ============= ==========================================================

    ``follow_lr`` is the corrected weight decay of Defazio 2025, "Why Gradients Rapidly Increase Near the End of
    Training", arXiv 2506.02285, with power 1; with 0 λ is constant, with -1 lr·λ is. ``per_step`` says what that is to
    be: the part of the weights that each step takes, whatever the lr does (independent weight decay: Wortsman et al.
    2023, arXiv 2309.14322; for µP Kosson et al. 2025, arXiv 2510.19093). As λ would grow without bound where the lr
    goes to 0, both go by no less than a thousandth of the peak lr; below that, lr·λ falls with the lr. With
    ``timescale``, the weights average the updates of about the last T steps (Wang & Aitchison 2024, arXiv 2405.13698).

    Args:
        schedule: which of these it is.
        start: λ at the start; for ``follow_lr`` the λ at the peak of the lr.
        end: λ at the end.
        steps: T in optimizer steps.
        epochs: T in epochs instead, whole or not. With neither, the schedule ends with the run.
        fraction: for ``timescale``, T as a part of the run instead (Bergsma et al. 2025, arXiv 2505.13738).
        power: the power of ``follow_lr``, of any sign.
        delay_steps: D in optimizer steps.
        delay_epochs: D in epochs instead.
        peak_lr: the peak of the group's lr. By default the ``max_lr`` of the param group, which ``OneCycleLR`` sets,
            else the lr (or, if higher, ``initial_lr``) that the group had when it was made. Schedulers that go above
            that (``CyclicLR``, a ``LambdaLR`` with factors above 1) need it.

    Raises:
        TypeError: for a value of the wrong kind, or a field that this schedule does not have.
        ValueError: for a value out of range, a field that is missing, or a length in two units.

    >>> DecaySchedule("cosine", 0.04, 0.4)
    DecaySchedule('cosine', 0.04, 0.4)
    >>> DecaySchedule("linear", 0.1, 0.0, epochs=10, delay_epochs=5).text
    'linear 0.1 to 0 over 10 epochs after 5 epochs'
    """

    schedule: Kind
    start: float | None = None
    end: float | None = None
    steps: int | None = None
    epochs: float | None = None
    delay_steps: int | None = None
    delay_epochs: float | None = None
    peak_lr: float | None = None
    fraction: float | None = None
    power: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, str):
            raise TypeError(
                f"schedule must be one of {', '.join(FIELDS)}, got {self.schedule!r}; a value has one schedule only"
            )
        if self.schedule not in FIELDS:
            raise ValueError(f"unknown schedule {self.schedule!r}; {hint(self.schedule, FIELDS)}")
        checked = {
            "start": nonnegative_number("start", self.start),
            "end": nonnegative_number("end", self.end),
            "steps": whole_number("steps", self.steps, least=1),
            "epochs": positive_number("epochs", self.epochs),
            "delay_steps": whole_number("delay_steps", self.delay_steps, least=0),
            "delay_epochs": nonnegative_number("delay_epochs", self.delay_epochs),
            "peak_lr": positive_number("peak_lr", self.peak_lr),
            "fraction": positive_number("fraction", self.fraction),
            "power": finite_number("power", self.power),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
            if value is not None and name not in FIELDS[self.schedule]:
                raise TypeError(f"a {self.schedule} schedule has no {name}; it has {', '.join(FIELDS[self.schedule])}")
        for name in ("start", "end"):
            if name in FIELDS[self.schedule] and checked[name] is None:
                what = "lr·λ at each step" if self.schedule == "per_step" else "the λ that it has there"
                raise ValueError(f"a {self.schedule} schedule needs {name}, {what}")
        for pair in (_LENGTHS, _DELAYS):
            if all(checked[name] is not None for name in pair):
                raise ValueError(f"{pair[0]} and {pair[1]} say the same thing twice: give one of them")
        if self.schedule == "timescale" and self.steps is None and self.epochs is None and self.fraction is None:
            raise ValueError(
                "a timescale needs steps, epochs or a fraction of the run: the time over which updates are averaged"
            )
        if self.fraction is not None and (self.steps is not None or self.epochs is not None):
            raise ValueError("fraction, steps and epochs say the same thing: give one of them")
        if self.schedule == "exponential" and not (self.start and self.end):
            raise ValueError(
                f"an exponential schedule goes between values above 0, got {self.start:g} and {self.end:g}; use linear "
                "or cosine to reach 0"
            )

    def __repr__(self) -> str:
        given = self.as_dict()
        parts = [repr(given.pop(name)) for name in ("schedule", "start", "end") if name in given]
        return f"DecaySchedule({', '.join([*parts, *(f'{name}={value!r}' for name, value in given.items())])})"

    @property
    def text(self) -> str:
        """The schedule in words that fit a table cell."""
        lengths = [f"{value:g} {name}" for name in _LENGTHS if (value := getattr(self, name)) is not None]
        over = "".join(f" over {length}" for length in lengths)
        delays = [(value, name.removeprefix("delay_")) for name in _DELAYS if (value := getattr(self, name))]
        after = "".join(f" after {value:g} {unit}" for value, unit in delays)
        peak = f" at lr {self.peak_lr:g}" if self.peak_lr else ""
        if self.schedule == "timescale":
            return f"timescale {lengths[0] if lengths else f'{self.fraction:g} of the run'}{peak}"
        if self.end is None:
            power = "" if self.power is None else f" to the power {self.power:g} of the lr"
            return f"{self.schedule} {self.start:g}{power}{peak}{after}"
        return f"{self.schedule} {self.start:g} to {self.end:g}{over}{after}"

    def as_dict(self) -> dict[str, Any]:
        """The fields that were given, as plain data that ``DecaySchedule(**data)`` takes.

        >>> DecaySchedule("follow_lr", "0.1").as_dict()
        {'schedule': 'follow_lr', 'start': 0.1}
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def in_steps(
        self, total_steps: Callable[[], float], steps_per_epoch: Callable[[], float]
    ) -> tuple[int, int | None]:
        """D and T in the optimizer steps of a run.

        Args:
            total_steps: tells the optimizer steps of the run, asked where the schedule goes by them.
            steps_per_epoch: tells those of an epoch, asked where the schedule has a time in epochs.

        Returns:
            D, and T, None for a schedule that has no length.

        >>> DecaySchedule("cosine", 0.0, 0.1, delay_epochs=2).in_steps(lambda: 100, lambda: 5)
        (10, 90)
        """

        def steps(count: int | None, epochs: float | None) -> int | None:
            return count if epochs is None else max(round(epochs * steps_per_epoch()), 1 if epochs else 0)

        delay = steps(self.delay_steps, self.delay_epochs) or 0
        if self.fraction is not None:
            return delay, max(round(self.fraction * total_steps()), 1)
        length = steps(self.steps, self.epochs)
        if length is None and "steps" in FIELDS[self.schedule]:
            length = max(round(total_steps()) - delay, 1)
        return delay, length

    def value(
        self, step: int, *, length: int | None = None, delay: int = 0, lr: float = 1.0, peak_lr: float = 1.0
    ) -> float:
        """λ for one optimizer step, by the formulas above.

        Args:
            step: t, the optimizer steps done before it.
            length: T in optimizer steps, for schedules that have one.
            delay: D in optimizer steps.
            lr: the group's lr at this step, for ``follow_lr`` and ``per_step``.
            peak_lr: the peak of the group's lr, for these and ``timescale``.

        Returns:
            λ.

        Raises:
            ValueError: for a schedule that has a length, where it is not given.

        >>> [DecaySchedule("linear", 0.0, 0.4).value(t, length=4) for t in range(6)]
        [0.0, 0.1, 0.2, 0.30000000000000004, 0.4, 0.4]
        """
        start, end = self.start or 0.0, self.end or 0.0
        if self.schedule == "constant":
            return start if step >= delay else 0.0
        if self.schedule == "follow_lr":
            power = 1.0 if self.power is None else self.power
            ratio = min(lr / peak_lr, 1.0)
            return start * (ratio if power == 1.0 else max(ratio, _LEAST_LR if power < 0 else 0.0) ** power)
        if self.schedule == "per_step":
            return start / max(lr, _LEAST_LR * peak_lr)
        if length is None:
            raise ValueError(f"a {self.schedule} schedule needs length, the optimizer steps that it goes over")
        if self.schedule == "timescale":
            return 1 / (peak_lr * length)
        p = min(max((step - delay) / length, 0.0), 1.0)
        if p in (0.0, 1.0):
            return end if p else start  # to the last bit
        if self.schedule == "linear":
            return start + (end - start) * p
        if self.schedule == "cosine":
            return end + (start - end) * (1 + math.cos(math.pi * p)) / 2
        return math.exp((1 - p) * math.log(start) + p * math.log(end))

    def plot(
        self, steps: int, *, lr: Lr | None = None, epochs: float | None = None, ax: Axes | None = None
    ) -> tuple[Figure, Axes]:
        """Plot λ over a run, before it begins.

        Args:
            steps: the optimizer steps of the run.
            lr: the lr of the run, for ``follow_lr``, ``per_step`` and ``timescale``: a function of the steps done, a
                list with a value for each step, or a number. Its peak is the highest of these, unless the schedule has
                its own.
            epochs: how many epochs the run has, for schedules with a time in epochs.
            ax: matplotlib axes to draw on; by default a new figure.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: without matplotlib.
            TypeError: for steps or an lr that are no numbers.
            ValueError: for steps below 1, and where the schedule needs ``lr`` or ``epochs`` and has none.
        """
        return plot_schedule(self, steps, lr, epochs, ax)


def scheduled_param_group(schedule: DecaySchedule) -> dict[str, Any]:
    """What a param group holds for a schedule: its fields, the steps done, and a λ until the first step sets it."""
    first = 0.0 if schedule.schedule in OF_LR_TIMES_LAMBDA else schedule.start or 0.0
    return {"weight_decay": first, SCHEDULE_KEY: schedule.as_dict(), STEP_KEY: 0}


def schedule_of(param_group: Mapping[str, Any]) -> DecaySchedule | None:
    """The schedule of a param group, None where it has none."""
    given = param_group.get(SCHEDULE_KEY)
    return None if given is None else _parsed(tuple(given.items()))


@functools.lru_cache(maxsize=10_000)
def _parsed(given: tuple[tuple[str, Any], ...]) -> DecaySchedule:
    return DecaySchedule(**dict(given))


def strength_of(param_group: Mapping[str, Any]) -> float | DecaySchedule:
    """The λ of a param group, 0 for an optimizer that knows none; where it is on a schedule, that."""
    return schedule_of(param_group) or float(param_group.get("weight_decay") or 0.0)


def strength_text(param_group: Mapping[str, Any]) -> str:
    """The λ of a param group in words: its schedule, or its value."""
    strength = strength_of(param_group)
    return strength.text if isinstance(strength, DecaySchedule) else f"{strength:g}"
