"""λ over time: what a schedule is, and how a param group holds it. Knows no rules, no model and no optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from lightning_regdecay.rules.formulas import strength_at
from lightning_regdecay.rules.names import hint
from lightning_regdecay.rules.plots import Lr, plot_schedule
from lightning_regdecay.rules.scalars import finite_number, nonnegative_number, positive_number, whole_number
from lightning_regdecay.rules.stages import (
    DELAYS,
    LENGTHS,
    RAMPS,
    Length,
    stage_at,
    stages_from,
    stages_in_steps,
    time_in_steps,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Kind = Literal["constant", "linear", "cosine", "exponential", "follow_lr", "per_step", "timescale", "stages"]

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
FIELDS: dict[str, tuple[str, ...]] = {
    "constant": ("start", *LENGTHS, *DELAYS),
    "linear": ("start", "end", *LENGTHS, *DELAYS),
    "cosine": ("start", "end", *LENGTHS, *DELAYS),
    "exponential": ("start", "end", *LENGTHS, *DELAYS),
    "follow_lr": ("start", "power", *LENGTHS, "peak_lr"),
    "per_step": ("start", *LENGTHS, "peak_lr"),
    "timescale": (*LENGTHS, "peak_lr"),
    "stages": ("stages",),
}
"""The fields of each kind of schedule."""
OF_LR_TIMES_LAMBDA = frozenset({"per_step", "timescale"})
"""Those that say what lr·λ is to be: for decoupled optimizers, and by the lr that is stepped with."""


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
    stages        those of a list, one after another
    ============= ==========================================================

    ``follow_lr`` is the corrected weight decay of Defazio 2025, "Why Gradients Rapidly Increase Near the End of
    Training", arXiv 2506.02285, with power 1; with 0 λ is constant, with -1 lr·λ is. ``per_step`` says what that is to
    be: the part of the weights that each step takes, whatever the lr does (independent weight decay: Wortsman et al.
    2023, arXiv 2309.14322; for µP Kosson et al. 2025, arXiv 2510.19093). As λ would grow without bound where the lr
    goes to 0, both go by no less than a thousandth of the peak lr; below that, lr·λ falls with the lr. With
    ``timescale``, the weights average the updates of about the last T steps (Wang & Aitchison 2024, arXiv 2405.13698).

    With ``stages``, t and p of a stage count from the step b that it begins at, where the lengths of the stages before
    it, added up, are rounded: b₁ = 0, bₖ = round(T₁ + … + Tₖ₋₁), and its T is bₖ₊₁ - bₖ. All but the last have a
    length, those that hold a value (``constant``, ``follow_lr``, ``per_step``) too; the last goes to the end of the run
    without one, and what it has come to holds after its end. A list of schedules, or of their fields, is short for it
    wherever a rule has its λ.

    Args:
        schedule: which of these it is.
        start: λ at the start; for ``follow_lr`` the λ at the peak of the lr.
        end: λ at the end.
        steps: T in optimizer steps.
        epochs: T in epochs instead, whole or not.
        fraction: T as a part of the run instead (for ``timescale`` Bergsma et al. 2025, arXiv 2505.13738). With none of
            the three, the schedule ends with the run.
        power: the power of ``follow_lr``, of any sign.
        delay_steps: D in optimizer steps.
        delay_epochs: D in epochs instead.
        peak_lr: the peak of the group's lr. By default the ``max_lr`` of the param group, which ``OneCycleLR`` sets,
            else the lr (or, if higher, ``initial_lr``) that the group had when it was made. Schedulers that go above
            that (``CyclicLR``, a ``LambdaLR`` with factors above 1) need it.
        stages: for ``stages``, the schedules or their fields, in order.

    Raises:
        TypeError: for a value of the wrong kind, or a field that this schedule does not have.
        ValueError: for a value out of range, a field that is missing, a length in two units, or stages that take more
            than the whole run.

    >>> DecaySchedule("cosine", 0.04, 0.4)
    DecaySchedule('cosine', 0.04, 0.4)
    >>> DecaySchedule("linear", 0.1, 0.0, epochs=10, delay_epochs=5).text
    'linear 0.1 to 0 over 10 epochs after 5 epochs'
    >>> warm_up = {"schedule": "linear", "start": 0.0, "end": 0.1, "steps": 500}
    >>> DecaySchedule("stages", stages=[warm_up, DecaySchedule("cosine", 0.1, 0.0)]).text
    'linear 0 to 0.1 over 500 steps, then cosine 0.1 to 0'
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
    stages: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, str):
            raise TypeError(
                f"schedule must be one of {', '.join(FIELDS)}, got {self.schedule!r}; several, one after another, are "
                "a list of schedules"
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
            "stages": None if self.stages is None else stages_from(self.stages, schedule_from),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
            if value is not None and name not in FIELDS[self.schedule]:
                raise TypeError(f"a {self.schedule} schedule has no {name}; it has {', '.join(FIELDS[self.schedule])}")
        for name in ("start", "end"):
            if name in FIELDS[self.schedule] and checked[name] is None:
                what = "lr·λ at each step" if self.schedule == "per_step" else "the λ that it has there"
                raise ValueError(f"a {self.schedule} schedule needs {name}, {what}")
        if self.schedule == "stages" and self.stages is None:
            raise ValueError("a schedule of stages needs stages, a list of schedules")
        for names in (LENGTHS, DELAYS):
            given = [name for name in names if checked[name] is not None]
            if len(given) > 1:
                raise ValueError(f"{' and '.join(given)} say the same thing twice: give one of them")
        if self.schedule == "timescale" and all(checked[name] is None for name in LENGTHS):
            raise ValueError(
                "a timescale needs steps, epochs or a fraction of the run: the time over which updates are averaged"
            )
        if self.fraction is not None and self.fraction > 1 and self.schedule != "timescale":
            raise ValueError(f"fraction is a part of the run, 1 for all of it, got {self.fraction:g}")
        if self.schedule == "exponential" and not (self.start and self.end):
            raise ValueError(
                f"an exponential schedule goes between values above 0, got {self.start:g} and {self.end:g}; use linear "
                "or cosine to reach 0"
            )

    def __repr__(self) -> str:
        given = {name: value for name, value in vars(self).items() if value is not None}
        given |= {} if self.stages is None else {"stages": list(self.stages)}
        parts = [repr(given.pop(name)) for name in ("schedule", "start", "end") if name in given]
        return f"DecaySchedule({', '.join([*parts, *(f'{name}={value!r}' for name, value in given.items())])})"

    @property
    def parts(self) -> tuple[DecaySchedule, ...]:
        """The schedules that it is made of: its stages, else itself."""
        return (self,) if self.stages is None else tuple(self.stages)

    @property
    def goes_by_lr(self) -> bool:
        """Whether it, or one of its stages, asks for the lr or its peak."""
        return any("peak_lr" in FIELDS[part.schedule] for part in self.parts)

    @property
    def of_lr_times_lambda(self) -> Kind | None:
        """The kind of it, or of one of its stages, that says what lr·λ is to be; None where there is none."""
        return next((part.schedule for part in self.parts if part.schedule in OF_LR_TIMES_LAMBDA), None)

    @property
    def first(self) -> float:
        """λ as far as it is known before a first step, 0 where it goes by the lr."""
        first = self.parts[0]
        return 0.0 if first.schedule in OF_LR_TIMES_LAMBDA else first.start or 0.0

    @property
    def text(self) -> str:
        """The schedule in words that fit a table cell."""
        if self.stages is not None:
            return ", then ".join(stage.text for stage in self.stages)
        units = {"steps": "steps", "epochs": "epochs", "fraction": "of the run"}
        lengths = [f"{value:g} {unit}" for name, unit in units.items() if (value := getattr(self, name)) is not None]
        over = "".join(f" over {length}" for length in lengths)
        delays = [(value, name.removeprefix("delay_")) for name in DELAYS if (value := getattr(self, name))]
        after = "".join(f" after {value:g} {unit}" for value, unit in delays)
        peak = f" at lr {self.peak_lr:g}" if self.peak_lr else ""
        if self.schedule == "timescale":
            return f"timescale {lengths[0]}{peak}"
        if self.end is None:
            power = "" if self.power is None else f" to the power {self.power:g} of the lr"
            return f"{self.schedule} {self.start:g}{power}{peak}{over}{after}"
        return f"{self.schedule} {self.start:g} to {self.end:g}{over}{after}"

    def as_dict(self) -> dict[str, Any]:
        """The fields that were given, as plain data that ``DecaySchedule(**data)`` takes.

        >>> DecaySchedule("follow_lr", "0.1").as_dict()
        {'schedule': 'follow_lr', 'start': 0.1}
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.stages is not None:
            values["stages"] = [stage.as_dict() for stage in self.stages]
        return {name: value for name, value in values.items() if value is not None}

    def in_steps(self, total_steps: Callable[[], float], steps_per_epoch: Callable[[], float]) -> tuple[int, Length]:
        """D and T in the optimizer steps of a run.

        Args:
            total_steps: tells the optimizer steps of the run, asked where the schedule goes by them.
            steps_per_epoch: tells those of an epoch, asked where the schedule has a time in epochs.

        Returns:
            D, and T, None for a schedule that has no length; of stages a tuple with that of each.

        >>> DecaySchedule("cosine", 0.0, 0.1, delay_epochs=2).in_steps(lambda: 100, lambda: 5)
        (10, 90)
        """
        if self.stages is not None:
            return 0, stages_in_steps(self.stages, total_steps, steps_per_epoch)
        delay = self.delay_steps or 0
        if self.delay_epochs:
            delay = max(round(self.delay_epochs * steps_per_epoch()), 1)
        if self.schedule not in RAMPS and self.schedule != "timescale":
            return delay, None
        length = time_in_steps(self, total_steps, steps_per_epoch)
        return delay, max(round(total_steps()) - delay if length is None else round(length), 1)

    def stage_at(self, step: int, length: Length) -> tuple[DecaySchedule, int, int | None]:
        """The stage that is in force at an optimizer step; a schedule without stages is one itself.

        Args:
            step: the optimizer steps done before it.
            length: T, as ``in_steps`` tells it.

        Returns:
            The stage, the steps done in it, and its T.

        >>> stages = [DecaySchedule("constant", 0.1, steps=20), DecaySchedule("linear", 0.1, 0.0)]
        >>> DecaySchedule("stages", stages=stages).stage_at(25, (20, 80))
        (DecaySchedule('linear', 0.1, 0.0), 5, 80)
        """
        if self.stages is None:
            return self, step, length if isinstance(length, int) else None
        if not isinstance(length, tuple) or len(length) != len(self.stages):
            raise ValueError(f"{len(self.stages)} stages need length, a tuple with the T of each, got {length!r}")
        return stage_at(self.stages, step, length)

    def value(
        self, step: int, *, length: Length = None, delay: int = 0, lr: float = 1.0, peak_lr: float = 1.0
    ) -> float:
        """λ for one optimizer step, by the formulas above.

        Args:
            step: t, the optimizer steps done before it.
            length: T in optimizer steps, for schedules that have one; of stages a tuple with that of each.
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
        stage, step, length = self.stage_at(step, length)
        return strength_at(stage, step, length, delay, lr, peak_lr)

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


def schedule_from(given: Mapping[str, Any], beside: Collection[str] = ()) -> DecaySchedule:
    """A schedule from its fields.

    Args:
        given: the fields.
        beside: those of a rule, which stand beside its λ.

    Raises:
        TypeError: for a field that no schedule has, or a value of the wrong kind.
        ValueError: as :class:`DecaySchedule`.
    """
    known = [field.name for field in fields(DecaySchedule)]
    for name in given:
        if name not in known:
            advice = "; it goes beside weight_decay, not into it" if name in beside else ""
            raise TypeError(f"unknown field {name!r} of a schedule; {hint(str(name), known)}{advice}")
    if "schedule" not in given:
        raise TypeError(f"a schedule says which one it is, as in {{schedule: linear, start: 0.1, end: 0}}, got {given}")
    return DecaySchedule(**given)


def check_alone(schedule: DecaySchedule) -> DecaySchedule:
    """Raise for a schedule that is a stage only: a length says nothing where a value is held to the end."""
    ends = {*RAMPS, "timescale", "stages"}
    for name in LENGTHS:
        if schedule.schedule not in ends and getattr(schedule, name) is not None:
            raise TypeError(
                f"a {schedule.schedule} schedule goes on to the end of the run, and {name} is how long it holds as a "
                "stage, in a list of schedules; leave it out, or write what comes after it"
            )
    return schedule


def scheduled_param_group(schedule: DecaySchedule) -> dict[str, Any]:
    """What a param group holds for a schedule: its fields, the steps done, and a λ until the first step sets it."""
    return {"weight_decay": schedule.first, SCHEDULE_KEY: schedule.as_dict(), STEP_KEY: 0}


def schedule_of(param_group: Mapping[str, Any]) -> DecaySchedule | None:
    """The schedule of a param group, None where it has none."""
    given = param_group.get(SCHEDULE_KEY)
    if given is None:
        return None
    stages = given.get("stages")
    return _parsed(
        tuple(pair for pair in given.items() if pair[0] != "stages"),
        None if stages is None else tuple(tuple(stage.items()) for stage in stages),
    )


_Fields = tuple[tuple[str, Any], ...]


@functools.lru_cache(maxsize=10_000)
def _parsed(given: _Fields, stages: tuple[_Fields, ...] | None) -> DecaySchedule:
    return DecaySchedule(**dict(given), stages=None if stages is None else [dict(stage) for stage in stages])


def strength_of(param_group: Mapping[str, Any]) -> float | DecaySchedule:
    """The λ of a param group, 0 for an optimizer that knows none; where it is on a schedule, that."""
    return schedule_of(param_group) or float(param_group.get("weight_decay") or 0.0)


def strength_text(param_group: Mapping[str, Any]) -> str:
    """The λ of a param group in words: its schedule, or its value."""
    strength = strength_of(param_group)
    return strength.text if isinstance(strength, DecaySchedule) else f"{strength:g}"
