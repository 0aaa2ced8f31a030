"""Histories of figures as plots: a line per group, or of many groups a heat map."""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_regdecay.figures.history import place_of
from lightning_regdecay.figures.measures import ALL, FIGURES
from lightning_regdecay.rules.names import TOTAL, hint
from lightning_regdecay.rules.plots import TIME, WEIGHT_DECAY, check_axes, pyplot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, float]]

LABELS = {
    "l2_norm": "L2 norm ‖w‖₂ (unit of the weights)",
    "penalty": "penalty ½·λ·‖w‖₂² (unit of the loss)",
    "weight_decay": WEIGHT_DECAY,
    "rms": "rms ‖w‖₂/√n (unit of the weights)",
    "decay_per_step": "decay per step lr·λ",
    "half_life": "half-life ln 2/(lr·λ) (steps)",
    "equilibrium": "rms beside its equilibrium (1: at rest)",
    "grad_norm": "gradient ‖g‖₂ (loss per weight)",
    "update_ratio": "update ratio ‖Δw‖₂/‖w‖₂",
    "decay_share": "decay share lr·λ·‖w‖₂/‖Δw‖₂",
    "angle": "angle of a step (radians)",
    "equilibrium_angle": "angle at equilibrium (radians)",
    "distance": "‖w - w₀‖₂",
    "largest": "largest rms of a tensor (unit of the weights)",
}
"""Every figure by its name, as an axis calls it."""
TIMES = {"step": TIME, "epoch": "time (epochs)"}
MOST_LINES = 20
"""How many groups are told apart as lines."""
_USUAL = ("l2_norm", "penalty")
_MOST_LABELS = 60  # beside a heat map
_MOST_MARKERS = 12  # on a line
_LINEAR_SPAN = 20  # largest over smallest value that a linear scale still shows apart
_DASHES = ("-", "--", "-.", ":")
_MARKERS = "osD^vP*X"
_COUNTS = ("no axes", "one axis", "two axes", "three axes", "four axes")


@dataclass(frozen=True)
class _Drawn:
    """What is to be drawn.

    Args:
        history: the records.
        prefix: the first part of their keys.
        figures: a panel for each.
        names: the groups, in order.
        has_total: whether the total is drawn with them.
        times: where each record lies on the x axis.
        time: what the x axis is called.
    """

    history: History
    prefix: str
    figures: Sequence[str]
    names: Sequence[str]
    has_total: bool
    times: Sequence[float]
    time: str
    labels: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        texts = {name: f"{name}{_strength_text(self.values(name, 'weight_decay'))}" for name in self.names}
        object.__setattr__(self, "labels", {**texts, TOTAL: TOTAL})

    def values(self, name: str, figure: str) -> list[float]:
        """A figure of a group over time, nan where it was not logged."""
        key = f"{self.prefix}/{name}/{figure}"
        return [record.get(key, math.nan) for record in self.history]


def plot_history(
    history: History,
    prefix: str,
    ax: Any = None,
    *,
    figures: str | Iterable[str] | None = None,
    groups: str | Iterable[str] | None = None,
    x: str = "step",
) -> tuple[Figure, list[Any]]:
    """Draw a history of figures, see :meth:`~lightning_regdecay.WeightDecayMonitor.plot`."""
    plt = pyplot()
    if not history:
        raise ValueError(
            "nothing to plot: no figures were logged yet; call trainer.fit first (what processes of ddp_spawn and "
            "ddp_notebook log stays with them: plot there, or from a checkpoint)"
        )
    if x not in TIMES:
        raise ValueError(f"x must be 'step' or 'epoch', got {x!r}")
    logged = _logged(history, prefix)
    names = _chosen_groups(groups, list(dict.fromkeys(itertools.chain(*logged.values()))))
    drawn = _Drawn(
        history=history,
        prefix=prefix,
        figures=_chosen_figures(figures, logged, _moves(history, prefix, names) and ax is None),
        names=[name for name in names if name != TOTAL],
        has_total=TOTAL in names,
        times=[record["step"] for record in history] if x == "step" else _epochs(history),
        time=TIMES[x],
    )
    is_map = len(drawn.names) > MOST_LINES
    panels = _new_panels(plt, drawn, is_map) if ax is None else _given_panels(ax, drawn.figures)
    if is_map:
        _draw_maps(plt, panels, drawn)
    else:
        _draw_lines(plt, panels, drawn)
        _add_legend(panels, drawn, is_ours=ax is None)
    for panel in panels if ax is not None or is_map else panels[-1:]:
        panel.set_xlabel(drawn.time)
    return panels[0].figure, panels


def _logged(history: History, prefix: str) -> dict[str, list[str]]:
    """The figures of a history, each with the groups that have it."""
    found: dict[str, list[str]] = {}
    for key in dict.fromkeys(itertools.chain(*history)):
        if (place := place_of(key, prefix)) is not None:
            found.setdefault(place.figure, []).append(place.group)
    return found


def _chosen_figures(figures: str | Iterable[str] | None, logged: Iterable[str], with_strength: bool) -> list[str]:
    """The figures to draw.

    Raises:
        TypeError: for what is no name.
        ValueError: for one that was not logged.
    """
    logged = list(logged)
    if figures is None:
        usual = [name for name in _USUAL if name in logged]
        if not usual:
            return logged
        return [*usual, "weight_decay"] if with_strength else usual
    if isinstance(figures, str) and figures == ALL:
        return logged
    chosen = list(dict.fromkeys(_names("figures", figures)))
    if not chosen:
        raise ValueError(f"figures is empty; logged are {', '.join(logged)}")
    for name in chosen:
        if name in logged:
            continue
        if name in FIGURES:
            raise ValueError(
                f"the figure {name!r} was not logged, logged are {', '.join(logged)}; name it when the monitor is "
                f"made: WeightDecayMonitor(figures=[{name!r}])"
            )
        raise ValueError(f"unknown figure {name!r}; {hint(name, logged)}")
    return chosen


def _chosen_groups(groups: str | Iterable[str] | None, known: list[str]) -> list[str]:
    """The groups to draw, in their own order.

    Raises:
        TypeError: for what is no name.
        ValueError: for a name or pattern of no group.
    """
    if groups is None:
        return known
    patterns = _names("groups", groups)
    if not patterns:
        raise ValueError(f"groups is empty; known are {', '.join(known)}")
    found: set[str] = set()
    for pattern in patterns:
        matched = {pattern} & set(known) or set(fnmatch.filter(known, pattern))
        if not matched:
            raise ValueError(f"no group is called {pattern!r}; {hint(pattern, known)}")
        found |= matched
    return [name for name in known if name in found]


def _names(what: str, given: Any) -> list[str]:
    """One name or many as a list."""
    names = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"{what} must be a name or a list of names, got {given!r}")
    return names


def _moves(history: History, prefix: str, names: Iterable[str]) -> bool:
    """Whether λ of a group changes over the history."""
    keys = [f"{prefix}/{name}/weight_decay" for name in names]
    return any(len({record[key] for record in history if key in record}) > 1 for key in keys)


def _strength_text(values: Iterable[float]) -> str:
    """λ over time in words: `` (λ 0.1)``, `` (λ 0.04 → 0.4)``.

    >>> _strength_text([0.1, 0.1]), _strength_text([0.04, 0.2, 0.4]), _strength_text([0.1, 0.0, 0.1])
    (' (λ 0.1)', ' (λ 0.04 → 0.4)', ' (λ 0 … 0.1)')
    """
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return ""
    first, last, least, most = (f"{value:.3g}" for value in (values[0], values[-1], min(values), max(values)))
    if first != last:
        return f" (λ {first} → {last})"
    return f" (λ {first})" if least == most else f" (λ {least} … {most})"


def _epochs(history: History) -> list[float]:
    """The epochs done at each record: a whole number at the last of an epoch, parts of it before.

    An epoch that is not done yet counts as long as the one before it.
    """
    ends = {int(record["epoch"]): record["step"] for record in history}
    lengths: dict[int, float] = {}
    for epoch, end in ends.items():
        own = end - ends[epoch - 1] if epoch - 1 in ends else end / (epoch + 1)
        is_last = epoch == max(ends)
        lengths[epoch] = max(own, lengths.get(epoch - 1, 0.0)) if is_last else own
        if is_last and own < lengths[epoch]:
            ends[epoch] = end + lengths[epoch] - own
    return [
        record["epoch"] + 1 - (ends[int(record["epoch"])] - record["step"]) / (lengths[int(record["epoch"])] or 1)
        for record in history
    ]


def _new_panels(plt: Any, drawn: _Drawn, is_map: bool) -> list[Any]:
    """Panels below each other for lines; for heat maps side by side, so that names stand once."""
    count, rows = len(drawn.figures), len(drawn.names)
    if is_map:
        size = (2.5 + 4 * count, min(max(1.5 + 0.17 * rows, 5), 1.5 + 0.17 * _MOST_LABELS))
        _, axes = plt.subplots(1, count, sharex=True, sharey=True, squeeze=False, figsize=size, layout="constrained")
    else:
        size = (9, max(3 * count, 4, 0.23 * rows + 0.5))
        _, axes = plt.subplots(count, 1, sharex=True, squeeze=False, figsize=size, layout="constrained")
    return list(axes.flat)


def _given_panels(ax: Any, figures: Sequence[str]) -> list[Any]:
    """The axes of the user, one for each figure."""
    panels = list(getattr(ax, "flat", ax)) if isinstance(ax, Iterable) else [ax]  # plt.subplots gives arrays
    if len(panels) != len(figures):
        count = _COUNTS[len(figures)] if len(figures) < len(_COUNTS) else f"{len(figures)} axes"
        raise ValueError(f"ax must be {count}, for {', '.join(figures)}, got {len(panels)}")
    for panel in panels:
        check_axes(panel)
    return panels


def _draw_lines(plt: Any, panels: Sequence[Any], drawn: _Drawn) -> None:
    """A line for each group; each beside its colour has dashes and markers, so that lines on each other are seen."""
    colors = plt.get_cmap("tab10" if len(drawn.names) <= 10 else "tab20")
    gap = math.ceil(len(drawn.times) / _MOST_MARKERS)
    for panel, figure in zip(panels, drawn.figures):
        if drawn.has_total and figure == "penalty":
            # Wide and pale, under the groups: where one group makes up most of it, both stay visible.
            _draw_line(panel, drawn, TOTAL, figure, color="lightgray", linewidth=6)
        for number, name in enumerate(drawn.names):
            _draw_line(
                panel,
                drawn,
                name,
                figure,
                color=colors(number if len(drawn.names) <= 10 else 2 * number % 20 + number // 10),
                linestyle=_DASHES[number % len(_DASHES)],
                marker=_MARKERS[number % len(_MARKERS)],
                markevery=(number % gap, gap),
                markersize=4,
            )
        panel.set_ylabel(LABELS.get(figure, figure))
        _finish(panel)


def _draw_line(panel: Any, drawn: _Drawn, name: str, figure: str, **style: Any) -> None:
    """A line of one figure over time."""
    points = [(time, value) for time, value in zip(drawn.times, drawn.values(name, figure)) if not math.isnan(value)]
    if points:
        if len(points) < style.get("markevery", (0, 1))[0] + 1:
            style["markevery"] = None
        panel.plot(*zip(*points), label=name, **style)


def _finish(panel: Any) -> None:
    """Scale and grid; a logarithmic scale where a linear one would press small groups onto the axis."""
    known = [abs(value) for line in panel.get_lines() for value in line.get_ydata() if math.isfinite(value)]
    values = [value for value in known if value]
    if values and max(values) > _LINEAR_SPAN * min(values):
        if len(values) == len(known):
            panel.set_yscale("log")
        else:
            panel.set_yscale("symlog", linthresh=min(values))  # has a place for zero, as of groups without decay
            panel.set_ylim(bottom=-0.3 * min(values))
    panel.grid(alpha=0.3)


def _add_legend(panels: Sequence[Any], drawn: _Drawn, is_ours: bool) -> None:
    """One legend for all panels, beside them."""
    handles = {line.get_label(): line for panel in panels for line in panel.get_lines()}
    names = [name for name in (*drawn.names, TOTAL) if name in handles]
    style: dict[str, Any] = {"frameon": False, "handlelength": 3, "fontsize": "small" if len(names) > 10 else None}
    style |= {"handles": [handles[name] for name in names], "labels": [drawn.labels[name] for name in names]}
    if is_ours:
        panels[0].figure.legend(loc="outside right center", **style)
    else:
        rightmost = max(panels, key=lambda panel: panel.get_position().x1)
        rightmost.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), **style)


def _draw_maps(plt: Any, panels: Sequence[Any], drawn: _Drawn) -> None:
    """A heat map for each figure: groups by time."""
    gap = math.ceil(len(drawn.names) / _MOST_LABELS)
    gap += gap > 1 and gap % 2 == 0  # odd, as of names in pairs (decay, no decay) an even one shows one kind only
    shown = range(0, len(drawn.names), gap)
    edges = _edges(drawn.times)
    for number, (panel, figure) in enumerate(zip(panels, drawn.figures)):
        rows = [drawn.values(name, figure) for name in drawn.names]
        norm, note = _scale(rows)
        colors = plt.get_cmap("viridis").with_extremes(bad="lightgray")
        mesh = panel.pcolormesh(edges, [i - 0.5 for i in range(len(rows) + 1)], rows, cmap=colors, norm=norm)
        panel.figure.colorbar(
            mesh, ax=panel, label=LABELS.get(figure, figure) + note, fraction=0.05, aspect=50, pad=0.02
        )
        panel.set_title(figure, fontsize="medium")
        if number == 0 or not panel.get_shared_y_axes().joined(panels[0], panel):
            panel.set_yticks(list(shown), [drawn.labels[drawn.names[i]] for i in shown], fontsize="x-small")
            panel.set_ylim(len(rows) - 0.5, -0.5)


def _scale(rows: Iterable[Iterable[float]]) -> tuple[Any, str]:
    """How values become colours: by their logarithm where they span much; and what gray stands for."""
    from matplotlib.colors import LogNorm, Normalize

    values = [value for row in rows for value in row]
    known = [value for value in values if math.isfinite(value)]
    positive = [value for value in known if value > 0]
    if positive and min(known) >= 0 and max(positive) > _LINEAR_SPAN * min(positive):
        note = "\ngray: 0" if 0 in known else ""
        norm: Any = LogNorm(min(positive), max(positive))
    else:
        norm, note = Normalize(min(known, default=0.0), max(known, default=1.0)), ""
    if len(known) < len(values):
        note = f"{note}, or no finite value" if note else "\ngray: no finite value"
    return norm, note


def _edges(times: Sequence[float]) -> list[float]:
    """Where the cells of some times begin and end.

    >>> _edges([1, 2, 4]), _edges([3])
    ([0.5, 1.5, 3.0, 5.0], [2.5, 3.5])
    """
    between = [(a + b) / 2 for a, b in itertools.pairwise(times)]
    if not between:
        return [times[0] - 0.5, times[0] + 0.5]
    return [2 * times[0] - between[0], *between, 2 * times[-1] - between[-1]]
