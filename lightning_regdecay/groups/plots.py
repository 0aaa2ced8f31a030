"""The groups of a model as a plot: a row per module, a cell per parameter in the colour of its λ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_regdecay.groups.parameters import ModelParameter, class_of
from lightning_regdecay.groups.patterns import put_together, split
from lightning_regdecay.groups.regions import Region
from lightning_regdecay.rules.plots import WEIGHT_DECAY, check_axes, pyplot
from lightning_regdecay.rules.rules import DecayRule
from lightning_regdecay.rules.schedules import DecaySchedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


NO_DECAY = "#f2f0e6"
OWN_STRENGTH = "#d4d4d4"
FROZEN = "white"
_MOST_IN_LEGEND = 24
_LINEAR_SPAN = 20  # largest over smallest λ that a linear scale of colours still shows apart
_LONGEST_NAME = 22


class _Cell(NamedTuple):
    """A parameter in its place.

    Args:
        name: its name in the module.
        group: the group that it is in, None where it is frozen.
        tied: whether it stands in an earlier place too.
    """

    name: str
    group: str | None
    tied: bool


class _Row(NamedTuple):
    """Modules of one path but for numbers, whose parameters are in the same groups."""

    label: str
    cells: tuple[_Cell, ...]


class _Look(NamedTuple):
    """How the parameters of a group look."""

    color: Any
    hatch: str | None


def plot_groups(groups: Sequence[Any], parameters: Sequence[ModelParameter], ax: Axes | None) -> tuple[Figure, Axes]:
    """Draw which parameter is in which group, see :meth:`DecayGroups.plot`."""
    plt = pyplot()
    check_axes(ax)
    rows = _rows(groups, parameters)
    columns = max(len(row.cells) for row in rows)
    if ax is None:
        width = 1 + 1.5 * max(columns, 2) + 0.08 * max(len(row.label) for row in rows)
        _, ax = plt.subplots(figsize=(width, 1.2 + 0.36 * len(rows)), layout="constrained")
    strengths = {group.name: _strength(group) for group in groups}
    norm = _norm([strength for strength in strengths.values() if strength])
    looks = {group.name: _look(plt, norm, group, strengths[group.name]) for group in groups}
    for y, row in enumerate(rows):
        for x, cell in enumerate(row.cells):
            _draw_cell(ax, x, y, cell, None if cell.group is None else looks[cell.group])
    ax.set_xlim(-0.05, columns)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_yticks(range(len(rows)), [row.label for row in rows])
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    _add_legend(plt, ax, groups, looks, norm, has_frozen=any(cell.group is None for row in rows for cell in row.cells))
    return ax.figure, ax  # type: ignore[return-value]  # or the part of a figure that the axes are in


def _rows(groups: Iterable[Any], parameters: Iterable[ModelParameter]) -> list[_Row]:
    """The rows, in the order of the model; layers that are alike share one."""
    groups_of: dict[str, list[tuple[str, Region | None]]] = {}
    for group in groups:
        for name in group.params:
            groups_of.setdefault(name, []).append((group.name, group.regions.get(name)))
    modules: dict[str, list[_Cell]] = {}
    labels: dict[str, str] = {}
    for parameter in parameters:
        for place in parameter.places:
            path, _, name = place.name.rpartition(".")
            labels.setdefault(path, path or f"({class_of(place.module).__name__})")
            tied = place is not parameter
            cells = modules.setdefault(path, [])
            for group, region in groups_of.get(parameter.name, ()):
                part = name if region is None else f"{name} {region.label or region.text}"
                cells.append(_Cell(part, group, tied=tied))
            if parameter.name not in groups_of:
                cells.append(_Cell(name, None, tied=tied))
    alike: dict[tuple[str, tuple[_Cell, ...]], list[list[int]]] = {}
    for path, cells in modules.items():
        template, numbers = split(labels[path])
        alike.setdefault((template, tuple(cells)), []).append(numbers)
    return [
        _Row(put_together(template, numbers) + (f"  ({len(numbers):,})" if len(numbers) > 1 else ""), cells)
        for (template, cells), numbers in alike.items()
    ]


def _strength(group: Any) -> float | None:
    """The λ that a group goes by its colour for, of a schedule the highest; None where it is not known here."""
    rule: DecayRule | None = group.rule
    if rule is None:
        return None
    if isinstance(rule.weight_decay, DecaySchedule):
        known = [part for part in rule.weight_decay.parts if part.of_lr_times_lambda is None]
        return max((value for part in known for value in (part.start, part.end) if value is not None), default=None)
    if rule.decay_mult is not None:
        return None if rule.decay_mult else 0.0
    return rule.weight_decay


def _norm(strengths: Sequence[float]) -> Any:
    """How a λ above 0 becomes a colour."""
    from matplotlib.colors import LogNorm, Normalize

    if not strengths:
        return None
    least, most = min(strengths), max(strengths)
    if least == most:
        return Normalize(0.0, most)
    return LogNorm(least, most) if most > _LINEAR_SPAN * least else Normalize(0.0, most)


def _look(plt: Any, norm: Any, group: Any, strength: float | None) -> _Look:
    """Dots mark a λ that moves, stripes a λ that goes by the optimizer's own."""
    moves = group.rule is not None and isinstance(group.rule.weight_decay, DecaySchedule)
    hatch = "..." if moves else None
    if strength is None:
        return _Look(OWN_STRENGTH, hatch or "//")
    return _Look(_colors(plt)(norm(strength)) if strength else NO_DECAY, hatch)


def _colors(plt: Any) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    # No darker than lets a name be read on it.
    return LinearSegmentedColormap.from_list("decay", plt.get_cmap("YlOrRd")([0.1, 0.25, 0.4, 0.55, 0.65]))


def _draw_cell(ax: Any, x: float, y: float, cell: _Cell, look: _Look | None) -> None:
    """A parameter, with its name and that of its group."""
    style: Mapping[str, Any] = (
        {"facecolor": FROZEN, "linestyle": ":"} if look is None else {"facecolor": look.color, "hatch": look.hatch}
    )
    from matplotlib.patheffects import withStroke

    ax.barh(y, 0.95, 0.86, left=x, edgecolor="gray", linewidth=0.6, **style)
    name = f"{_shortened(cell.name)} (tied)" if cell.tied else _shortened(cell.name)
    halo = [withStroke(linewidth=2.5, foreground=style["facecolor"])]  # keeps hatches off the letters
    for text, above, size in ((name, 0.16, 8), (_shortened(cell.group or "frozen"), -0.24, 6)):
        ax.text(x + 0.475, y - above, text, ha="center", va="center", fontsize=size, path_effects=halo)


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _add_legend(
    plt: Any, ax: Any, groups: Sequence[Any], looks: Mapping[str, _Look], norm: Any, has_frozen: bool
) -> None:
    """What the colours are: of few groups each by name, of many the colours of λ alone."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.patches import Patch

    if len(groups) <= _MOST_IN_LEGEND:
        entries = [(f"{group.name} (λ {group.strength_text})", looks[group.name]) for group in groups]
    else:
        kinds = [("λ 0", _Look(NO_DECAY, None)), ("λ by the optimizer's own", _Look(OWN_STRENGTH, "//"))]
        entries = [(text, look) for text, look in kinds if look in looks.values()]
        if norm is not None:
            ax.figure.colorbar(
                ScalarMappable(norm, _colors(plt)), ax=ax, label=WEIGHT_DECAY, fraction=0.05, aspect=50, pad=0.02
            )
    handles = [
        Patch(facecolor=look.color, hatch=look.hatch, edgecolor="gray", linewidth=0.6, label=text)
        for text, look in entries
    ]
    if has_frozen:
        handles.append(Patch(facecolor=FROZEN, edgecolor="gray", linestyle=":", label="frozen, in no group"))
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, frameon=False, fontsize="small")
