"""Schedules one after another: what a list may hold, and which one is in force. Knows schedules by their fields.

Stage k begins at step b_k, where the lengths of those before it, added up, are rounded: so the parts of a run that a
list is made of neither overlap nor leave a step out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

LENGTHS = ("steps", "epochs", "fraction")
"""The fields of a length, of which a schedule may have one."""
DELAYS = ("delay_steps", "delay_epochs")
RAMPS = frozenset({"linear", "cosine", "exponential"})
"""The kinds that go from start to end, and end with the run where no length is given."""

Length: TypeAlias = int | tuple[int | None, ...] | None
"""T in optimizer steps, of a list of schedules that of each; None for one that goes on."""
_EXAMPLE = "[{schedule: linear, start: 0, end: 0.1, steps: 500}, {schedule: cosine, start: 0.1, end: 0}]"


def stages_from(given: Any, make: Callable[[Mapping[str, Any]], Any]) -> tuple[Any, ...]:
    """The schedules of a list, checked.

    Args:
        given: schedules, or their fields.
        make: makes one of its fields.

    Raises:
        TypeError: for what is no list of schedules.
        ValueError: for a length that is missing, or that leaves no time for others.
    """
    if not is_list(given):
        raise TypeError(f"stages must be a list of schedules, such as {_EXAMPLE}, got {given!r}")
    if not given:
        raise ValueError(f"an empty list of schedules says nothing about λ; write {_EXAMPLE}, or a number")
    stages = []
    for number, one in enumerate(given, start=1):
        try:
            stages.append(_stage(one, make, is_last=number == len(given)))
        except (TypeError, ValueError) as error:
            raise type(error)(f"stage {number}: {error}") from None
    _check_fractions(stages)
    return tuple(stages)


def is_list(value: Any) -> bool:
    """Whether a value is a list, of the kinds that configurations have."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def time_in_steps(
    schedule: Any, total_steps: Callable[[], float], steps_per_epoch: Callable[[], float]
) -> float | None:
    """The length of one schedule in optimizer steps, not rounded yet; None where it has none."""
    if schedule.epochs is not None:
        return float(schedule.epochs * steps_per_epoch())
    if schedule.fraction is not None:
        return float(schedule.fraction * total_steps())
    return None if schedule.steps is None else float(schedule.steps)


def stages_in_steps(
    stages: Sequence[Any], total_steps: Callable[[], float], steps_per_epoch: Callable[[], float]
) -> tuple[int | None, ...]:
    """T of each stage in optimizer steps, for a timescale that of its average."""
    lengths: list[int | None] = []
    time, begin = 0.0, 0
    for stage in stages:
        length = time_in_steps(stage, total_steps, steps_per_epoch)
        if stage.schedule == "timescale":  # the last one, whose length says something else
            lengths.append(max(round(length or 0), 1))
        elif length is not None:
            time += length
            end = max(round(time), begin + 1)
            lengths.append(end - begin)
            begin = end
        else:
            lengths.append(max(round(total_steps()) - begin, 1) if stage.schedule in RAMPS else None)
    return tuple(lengths)


def stage_at(stages: Sequence[Any], step: int, lengths: Sequence[int | None]) -> tuple[Any, int, int | None]:
    """The stage that is in force after so many steps, the steps done in it, and its T; after all of them the last."""
    begin = 0
    for stage, length in zip(stages[:-1], lengths):
        if step < begin + (length or 0):
            return stage, step - begin, length
        begin += length or 0
    return stages[-1], step - begin, lengths[-1]


def _stage(given: Any, make: Callable[[Mapping[str, Any]], Any], is_last: bool) -> Any:
    if is_list(given) or getattr(given, "stages", None) is not None:
        raise TypeError("it is a list itself; write its schedules into the one list")
    stage = make(given) if isinstance(given, Mapping) else given
    if not hasattr(stage, "schedule"):
        raise TypeError(f"it must be a schedule, such as {{schedule: constant, start: 0.1, epochs: 5}}, got {given!r}")
    if stage.stages is not None:
        raise TypeError("it is a list itself; write its schedules into the one list")
    for name in DELAYS:
        if getattr(stage, name):
            raise ValueError(
                f"it has {name}, and stages begin where the one before ends; for a delay, put a stage before it, such "
                "as {schedule: constant, start: 0, steps: 100}"
            )
    if is_last:
        return stage
    if stage.schedule == "timescale":
        raise ValueError(
            "a timescale can be the last stage only: its steps, epochs or fraction are the time over which updates are "
            "averaged, and do not say how long it holds"
        )
    if all(getattr(stage, name) is None for name in LENGTHS):
        raise ValueError(
            f"a {stage.schedule} schedule needs steps, epochs or a fraction of the run here, for the next stage to "
            "begin; the last one alone may go without, to the end of the run"
        )
    return stage


def _check_fractions(stages: Sequence[Any]) -> None:
    """Raise where parts of a run are more than the whole, or leave nothing for a stage that needs some of it."""
    every = [s.fraction for s in stages if s.fraction is not None and s.schedule != "timescale"]
    total = math.fsum(every)
    if total > 1 + 1e-9:
        raise ValueError(
            f"the stages take {' + '.join(f'{one:g}' for one in every)} = {total:g} of the run: their fractions may be "
            "1 in all"
        )
    has_rest = stages[-1].schedule == "timescale" or all(getattr(stages[-1], name) is None for name in LENGTHS)
    if has_rest and total > 1 - 1e-9:
        raise ValueError(
            f"stage {len(stages)}: it never begins, as the stages before it take {total:g} of the run; make one of "
            "their fractions smaller"
        )
