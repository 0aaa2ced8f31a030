"""A schedule is seen before the run."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

from lightning_regdecay import DecaySchedule

pytestmark = pytest.mark.usefixtures("no_window")


def drawn(schedule, *args, **kwargs):
    _, ax = schedule.plot(*args, **kwargs)
    (line,) = ax.get_lines()
    return line.get_ydata().tolist()


def test_shows_what_it_is_over_the_steps():
    figure, ax = DecaySchedule("cosine", 0.04, 0.4).plot(100)
    (line,) = ax.get_lines()
    assert figure is ax.figure
    assert line.get_xdata().tolist() == list(range(100))
    assert line.get_ydata() == pytest.approx([0.4 - 0.36 * (1 + math.cos(math.pi * t / 100)) / 2 for t in range(100)])
    assert ax.get_xlabel() == "time (optimizer steps)"
    assert ax.get_ylabel() == "weight decay λ"
    assert ax.get_title() == "cosine 0.04 to 0.4"
    assert ax.get_ylim()[0] == 0


def test_without_a_length_it_ends_with_the_run_after_its_delay():
    assert drawn(DecaySchedule("linear", 0.0, 0.4, delay_steps=2), 6) == pytest.approx([0, 0, 0, 0.1, 0.2, 0.3])


def test_times_in_epochs():
    schedule = DecaySchedule("linear", 0.0, 0.4, epochs=2, delay_epochs=1)
    assert drawn(schedule, 8, epochs=4) == pytest.approx([0, 0, 0, 0.1, 0.2, 0.3, 0.4, 0.4])
    with pytest.raises(ValueError, match=r"has a time in epochs: pass how many the run has, plot\(8, epochs=10\)"):
        schedule.plot(8)


@pytest.mark.parametrize("lr", [lambda step: 1e-3 * (4 - step), [4e-3, 3e-3, 2e-3, 1e-3]])
def test_follows_an_lr(lr):
    assert drawn(DecaySchedule("follow_lr", 0.4), 4, lr=lr) == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert drawn(DecaySchedule("follow_lr", 0.4, peak_lr=8e-3), 4, lr=lr) == pytest.approx([0.2, 0.15, 0.1, 0.05])


def test_a_timescale_is_constant():
    assert drawn(DecaySchedule("timescale", steps=500), 3, lr=[1e-3, 2e-3, 0.0]) == pytest.approx([1.0] * 3)
    assert drawn(DecaySchedule("timescale", steps=500, peak_lr=1e-3), 1) == pytest.approx([2.0])


@pytest.mark.parametrize("schedule", [DecaySchedule("follow_lr", 0.4), DecaySchedule("timescale", steps=500)])
def test_an_lr_that_is_needed(schedule):
    with pytest.raises(ValueError, match="schedule goes by the lr: pass lr, a number, a list or a function"):
        schedule.plot(4)
    with pytest.raises(ValueError, match="the lr is never above 0"):
        schedule.plot(4, lr=0.0)
    with pytest.raises(ValueError, match="lr must have a value for each of the 4 steps, got 2"):
        schedule.plot(4, lr=[1e-3, 1e-3])


@pytest.mark.parametrize(("steps", "error"), [(0, ValueError), (1.5, ValueError), (None, TypeError)])
def test_wrong_steps(steps, error):
    with pytest.raises(error, match="steps"):
        DecaySchedule("constant", 0.1).plot(steps)


def test_long_runs_are_thinned_out_and_keep_their_end():
    _, ax = DecaySchedule("linear", 0.0, 1.0).plot(100_001)
    times = ax.get_lines()[0].get_xdata()
    assert len(times) < 2100
    assert times[-1] == 100_000


def test_on_axes_of_the_user():
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots()
    assert DecaySchedule("constant", 0.1).plot(3, ax=ax) == (figure, ax)


def test_what_are_no_axes():
    with pytest.raises(TypeError, match="ax must be matplotlib axes, got 5"):
        DecaySchedule("constant", 0.1).plot(3, ax=5)


@pytest.mark.parametrize(
    ("lr", "error", "message"),
    [
        ("x", ValueError, "lr must be a number, got the text 'x'"),
        ([0.1, "y", 0.1], ValueError, "lr must be a number, got the text 'y'"),
        ([0.1, None, 0.1], TypeError, "lr must be a number at each step, got None"),
        (object(), TypeError, "lr must be a number, got <object object"),
        (lambda step: -step, ValueError, "lr must be a finite number of at least 0, got -1"),
    ],
)
def test_an_lr_that_is_none(lr, error, message):
    with pytest.raises(error, match=message):
        DecaySchedule("follow_lr", 0.1).plot(3, lr=lr)


@pytest.mark.parametrize("lr", [1, "1e-3", np.full(3, 0.1), torch.full((3,), 0.1), [np.float32(0.1)] * 3])
def test_an_lr_of_any_kind_of_number(lr):
    values = drawn(DecaySchedule("follow_lr", 0.1), 3, lr=lr)
    assert values == [0.1] * 3


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match=r"plot\(\) needs matplotlib: pip install matplotlib"):
        DecaySchedule("constant", 0.1).plot(3)
