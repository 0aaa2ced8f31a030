"""Which λ a rule means for a param group at this moment: lengths of the run, peaks of the lr, steps done."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from lightning.fabric.utilities import rank_zero_warn

from lightning_regdecay.rules.scalars import positive_number
from lightning_regdecay.rules.schedules import OF_LR_TIMES_LAMBDA, STEP_KEY, DecaySchedule
from lightning_regdecay.rules.stages import Length

Lengths = Mapping[str, float]


class Strengths:
    """The λ of schedules, over lengths that the user has given or a Trainer knows."""

    def __init__(self) -> None:
        self.ask: Callable[[], Lengths] = dict
        """Tells what is known of ``total_steps`` and ``steps_per_epoch`` of the run."""
        self.steps_done: Callable[[], int] = lambda: 0
        """Tells the optimizer steps that the run has done, as far as it is known."""
        self.given: Lengths = {}
        """Lengths of the user's."""
        self._asked: Lengths = {}
        self._warned: set[tuple[str, str]] = set()

    def give(self, given: Lengths) -> None:
        """Take lengths of the user's, which stay; one that is not given stays what it was."""
        self.given = {**self.given, **given}

    def absorb(self, other: Strengths) -> None:
        """Take over what is known of the run from another."""
        self.given = {**other.given, **self.given}

    def ask_anew(self) -> None:
        """Forget what was asked: a run begins."""
        self._asked = {}
        self._warned.clear()

    def weight_decay(
        self, schedule: DecaySchedule, group: Mapping[str, Any], peak_lr: float, name: str, lr_mult: float = 1.0
    ) -> float:
        """λ of a schedule for the next step of a param group.

        Args:
            schedule: the schedule.
            group: the param group, with its ``lr`` and the count of its steps.
            peak_lr: the peak of its lr, as far as it is known.
            name: what the group is called.
            lr_mult: the factor of a rule on its lr, which is not in the group.

        Raises:
            ValueError: where a length that is needed is not known, or the peak of the lr is 0.
        """
        delay, length = schedule.in_steps(
            lambda: self._length(name, "total_steps"), lambda: self._length(name, "steps_per_epoch")
        )
        stage, step, own_length = schedule.stage_at(int(group.get(STEP_KEY, 0)), length)
        for part in schedule.parts:  # those of later stages, too, before the first step
            if part.goes_by_lr and (part.peak_lr or peak_lr) <= 0:
                raise ValueError(
                    f"the schedule of group {name!r} needs the peak of the lr, which is {peak_lr:g} as far as can be "
                    "seen here; give the schedule peak_lr"
                )
        self._warn_of_short_run(name, schedule, length)
        if not stage.goes_by_lr:
            return stage.value(step, length=own_length, delay=delay)
        peak = stage.peak_lr or peak_lr
        lr = as_number(group.get("lr"))
        if stage.schedule == "follow_lr" and lr > peak:
            self._warn_of_higher_lr(name, lr, peak)
        # λ of follow_lr goes by a ratio, which has the factor above and below.
        factor = lr_mult if stage.schedule in OF_LR_TIMES_LAMBDA else 1.0
        return stage.value(step, length=own_length, lr=factor * lr, peak_lr=factor * peak)

    def _warn_of_short_run(self, name: str, schedule: DecaySchedule, length: Length) -> None:
        """Name the first stage that a run does not come to, where it is known how long that is."""
        if not isinstance(length, tuple) or (total_steps := self._known("total_steps")) is None:
            return
        begins = itertools.accumulate(own or 0 for own in length[:-1])
        late = next(((number, begin) for number, begin in enumerate(begins, start=2) if begin >= total_steps), None)
        if late is not None and (name, "stages") not in self._warned:
            self._warned.add((name, "stages"))
            rank_zero_warn(
                f"the run of {total_steps:g} optimizer steps ends before stage {late[0]} of the schedule of group "
                f"{name!r} ({schedule.text}), which would begin after {late[1]:g}; make the stages before it shorter, "
                "or give them a fraction of the run"
            )

    def _warn_of_higher_lr(self, name: str, lr: float, peak_lr: float) -> None:
        if (name, "lr") not in self._warned:
            self._warned.add((name, "lr"))
            rank_zero_warn(
                f"the lr of group {name!r} is {lr:g}, above the peak {peak_lr:g} that its schedule follow_lr reckons "
                "with: λ stays at its start there; give the schedule peak_lr"
            )

    def _length(self, name: str, which: str) -> float:
        known = self._known(which)
        if known is None:
            of = "run" if which == "total_steps" else "epoch"
            raise ValueError(
                f"the schedule of group {name!r} needs the length of the {of}, which is not known here; give the "
                "schedule its times in steps, or call lightning_regdecay.schedule_weight_decay(optimizer, "
                "total_steps=..., steps_per_epoch=...)"
            )
        return known

    def _known(self, which: str) -> float | None:
        if which in self.given:
            return self.given[which]
        if not self._asked:  # before a run begins, nothing is known yet
            self._asked = self.ask()
        return self._asked.get(which)


def lengths(*, total_steps: float | None, steps_per_epoch: float | None) -> Lengths:
    """The lengths that a user has given, checked.

    Raises:
        TypeError: for a length that is no number.
        ValueError: for one that is not above 0.
    """
    found = {
        "total_steps": positive_number("total_steps", total_steps),
        "steps_per_epoch": positive_number("steps_per_epoch", steps_per_epoch),
    }
    return {name: length for name, length in found.items() if length is not None}


TELLS_NO_STEPS = (
    "the checkpoint does not tell how many optimizer steps were done: schedules of the weight decay begin anew"
)


def as_number(value: Any) -> float:
    """An option as a number, 0 where it is None (as the lr of transformers' Adafactor)."""
    return 0.0 if value is None else float(value)


def first_peak(group: Mapping[str, Any]) -> float:
    """The highest lr that a param group is to have, as far as its own values tell."""
    return max(as_number(group.get("lr")), as_number(group.get("initial_lr")))
