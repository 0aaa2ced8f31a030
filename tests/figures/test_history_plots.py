"""What is drawn of a history."""

from __future__ import annotations

import pytest

from lightning_regdecay import WeightDecayMonitor
from lightning_regdecay.figures.measures import FIGURES
from lightning_regdecay.figures.plots import LABELS

pytestmark = pytest.mark.usefixtures("no_window")


def monitor_of(figures, *, groups=("bias", "head", "rest"), steps=(1, 2, 3, 4), steps_per_epoch=2):
    """A monitor with a history; figures are values, or functions of the group's number and the step."""
    monitor = WeightDecayMonitor()
    monitor.history = [
        {
            "epoch": (step - 1) // steps_per_epoch,
            "step": step,
            **{
                f"decay/{group}/{name}": value(i, step) if callable(value) else value
                for i, group in enumerate(groups)
                for name, value in figures.items()
            },
        }
        for step in steps
    ]
    return monitor


def legend_of(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def lines_of(ax):
    return {line.get_label(): line for line in ax.get_lines()}


USUAL = {"l2_norm": 1.0, "penalty": 0.05, "weight_decay": 0.1}


class TestFigures:
    def test_by_default_the_norm_and_the_penalty(self):
        _, axes = monitor_of({**USUAL, "rms": 1.0}).plot()
        assert [ax.get_ylabel() for ax in axes] == [LABELS["l2_norm"], LABELS["penalty"]]

    def test_a_weight_decay_that_moves_has_a_panel(self):
        monitor = monitor_of({**USUAL, "weight_decay": lambda i, step: 0.1 * step if i == 2 else 0.1})
        figure, axes = monitor.plot()
        assert [ax.get_ylabel() for ax in axes] == [LABELS["l2_norm"], LABELS["penalty"], "weight decay λ"]
        assert legend_of(figure) == ["bias (λ 0.1)", "head (λ 0.1)", "rest (λ 0.1 → 0.4)"]
        assert len(monitor.plot(groups="head")[1]) == 2
        assert len(monitor.plot(axes[:2])[1]) == 2

    def test_where_neither_was_logged_all_that_were(self):
        figure, axes = monitor_of({"rms": 1.0, "angle": 0.1}).plot()
        assert [ax.get_ylabel() for ax in axes] == ["rms ‖w‖₂/√n (unit of the weights)", "angle of a step (radians)"]
        assert legend_of(figure) == ["bias", "head", "rest"]

    def test_some(self):
        monitor = monitor_of({**USUAL, "rms": 1.0})
        assert [ax.get_ylabel() for ax in monitor.plot(figures="rms")[1]] == [LABELS["rms"]]
        assert [ax.get_ylabel() for ax in monitor.plot(figures=["rms", "l2_norm"])[1]] == [
            LABELS["rms"],
            LABELS["l2_norm"],
        ]

    def test_panels_share_the_time(self):
        _, axes = monitor_of(USUAL).plot()
        assert axes[0].get_shared_x_axes().joined(*axes)
        assert [ax.get_xlabel() for ax in axes] == ["", "time (optimizer steps)"]

    def test_every_figure_has_a_label(self):
        assert list(LABELS) == list(FIGURES)

    @pytest.mark.parametrize(
        ("figures", "message"),
        [
            ("rms", r"the figure 'rms' was not logged, .*: WeightDecayMonitor\(figures=\['rms'\]\)"),
            ("penalti", r"unknown figure 'penalti'; did you mean 'penalty'\?"),
            ([], "figures is empty; logged are l2_norm, penalty, weight_decay"),
        ],
    )
    def test_none_of_that_name(self, figures, message):
        with pytest.raises(ValueError, match=message):
            monitor_of(USUAL).plot(figures=figures)

    def test_all(self):
        monitor = monitor_of({**USUAL, "rms": 1.0})
        assert [ax.get_ylabel() for ax in monitor.plot(figures="all")[1]] == [
            LABELS[name] for name in ("l2_norm", "penalty", "weight_decay", "rms")
        ]

    @pytest.mark.parametrize("name", ["figures", "groups"])
    @pytest.mark.parametrize("given", [5, [None], {"rms": 1}.values()])
    def test_what_is_no_name(self, name, given):
        with pytest.raises(TypeError, match=f"{name} must be a name or a list of names, got "):
            monitor_of(USUAL).plot(**{name: given})

    def test_what_are_no_axes(self):
        with pytest.raises(TypeError, match="ax must be matplotlib axes, got 1"):
            monitor_of(USUAL).plot([1, 2])

    def test_on_one_axes_of_the_user(self):
        import matplotlib.pyplot as plt

        _, ax = plt.subplots()
        assert monitor_of(USUAL).plot(ax, figures="penalty")[1] == [ax]
        with pytest.raises(ValueError, match="ax must be two axes, for l2_norm, penalty, got 1"):
            monitor_of(USUAL).plot(ax)

    def test_on_a_grid_of_axes(self):
        import matplotlib.pyplot as plt

        _, grid = plt.subplots(1, 2, squeeze=False)
        assert monitor_of(USUAL).plot(grid)[1] == list(grid.flat)


class TestGroups:
    @pytest.mark.parametrize(
        ("groups", "names"),
        [("head", ["head"]), (["rest", "bias"], ["bias", "rest"]), ("[!h]*", ["bias", "rest"])],
    )
    def test_some(self, groups, names):
        _, axes = monitor_of(USUAL).plot(groups=groups)
        assert [list(lines_of(ax)) for ax in axes] == [names, names]

    @pytest.mark.parametrize(
        ("groups", "message"),
        [
            ("heads", r"no group is called 'heads'; did you mean 'head'\?"),
            (["head", "x*"], r"no group is called 'x\*'; known are bias, head, rest"),
            ([], "groups is empty; known are bias, head, rest"),
        ],
    )
    def test_none_of_that_name(self, groups, message):
        with pytest.raises(ValueError, match=message):
            monitor_of(USUAL).plot(groups=groups)

    def test_lines_on_each_other_are_told_apart(self):
        _, axes = monitor_of(USUAL, groups=[f"g{i}" for i in range(20)], steps=range(1, 101)).plot()
        looks = {(line.get_linestyle(), line.get_marker()) for line in axes[0].get_lines()}
        assert len(looks) == 8
        assert len({line.get_color() for line in axes[0].get_lines()}) == 20
        assert len({line.get_markevery() for line in axes[0].get_lines()}) > 1

    def test_lines_begin_where_their_group_does(self):
        monitor = monitor_of(USUAL, steps=range(3, 7))
        for record in monitor.history[:2]:
            del record["decay/head/l2_norm"]
        lines = lines_of(monitor.plot()[1][0])
        assert lines["bias"].get_xdata().tolist() == [3, 4, 5, 6]
        assert lines["head"].get_xdata().tolist() == [5, 6]


class TestTime:
    def test_in_epochs(self):
        _, axes = monitor_of(USUAL).plot(x="epoch")
        assert axes[-1].get_xlabel() == "time (epochs)"
        assert lines_of(axes[0])["head"].get_xdata().tolist() == [0.5, 1.0, 1.5, 2.0]

    def test_an_epoch_that_is_not_done(self):
        _, axes = monitor_of(USUAL, steps=range(1, 7), steps_per_epoch=4).plot(x="epoch")
        assert lines_of(axes[0])["head"].get_xdata().tolist() == [0.25, 0.5, 0.75, 1.0, 1.25, 1.5]

    def test_a_history_that_begins_late(self):
        _, axes = monitor_of(USUAL, steps=[7, 8, 9, 10]).plot(x="epoch")
        assert lines_of(axes[0])["head"].get_xdata().tolist() == [3.5, 4.0, 4.5, 5.0]

    def test_another_one(self):
        with pytest.raises(ValueError, match="x must be 'step' or 'epoch', got 'time'"):
            monitor_of(USUAL).plot(x="time")


class TestManyGroups:
    @pytest.mark.parametrize(("count", "labels"), [(26, 26), (200, 40)])
    def test_are_a_heat_map_for_each_figure(self, count, labels):
        monitor = monitor_of(USUAL, groups=[f"g{i}" for i in range(count)])
        figure, axes = monitor.plot()
        figure.canvas.draw()
        assert len(axes) == 2
        assert len(figure.axes) == 4  # with two colour bars
        for ax in axes:
            (mesh,) = ax.collections
            assert mesh.get_array().shape == (count, 4)
            assert not ax.get_lines()
            assert ax.get_xlabel() == "time (optimizer steps)"
        texts = [text.get_text() for text in axes[0].get_yticklabels()]
        assert texts[:1] == ["g0 (λ 0.1)"]
        assert len(texts) == labels
        assert [ax.get_ylabel() for ax in figure.axes[2:]] == [LABELS["l2_norm"], LABELS["penalty"]]
        assert not figure.legends

    def test_colours_go_by_the_logarithm_where_values_span_much(self):
        groups = [f"g{i}" for i in range(26)]
        figures = {"l2_norm": lambda i, step: 1.0 + i / 26, "penalty": lambda i, step: 10.0**i if i else 0.0}
        figure, axes = monitor_of(figures, groups=groups).plot()
        norms, penalties = (ax.collections[0].norm for ax in axes)
        assert type(norms).__name__ == "Normalize"
        assert type(penalties).__name__ == "LogNorm"
        assert (penalties.vmin, penalties.vmax) == (10.0, 1e25)
        assert figure.axes[3].get_ylabel() == f"{LABELS['penalty']}\ngray: 0"

    def test_of_one_moment_and_with_gaps(self):
        monitor = monitor_of(USUAL, groups=[f"g{i}" for i in range(21)], steps=[1])
        del monitor.history[0]["decay/g0/penalty"]
        figure, _ = monitor.plot()
        figure.canvas.draw()
        assert figure.axes[3].get_ylabel() == f"{LABELS['penalty']}\ngray: no finite value"

    def test_few_of_them_are_lines(self):
        monitor = monitor_of(USUAL, groups=[f"g{i}" for i in range(26)])
        assert list(lines_of(monitor.plot(groups="g1?")[1][0])) == [f"g1{i}" for i in range(10)]
