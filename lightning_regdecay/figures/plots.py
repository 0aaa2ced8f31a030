"""Histories of figures as plots; matplotlib is imported here only, and inside."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINEAR_SPAN = 20  # largest over smallest value that a linear axis still shows apart


def plot_history(history: Sequence[dict[str, float]], prefix: str, ax: Sequence[Any] | None) -> tuple[Figure, Any]:
    """Draw the norm and the penalty of each group over the optimizer steps."""
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError:
        raise ModuleNotFoundError("plot() needs matplotlib: pip install matplotlib") from None
    if not history:
        raise ValueError(
            "nothing to plot: no figures were logged yet; call trainer.fit first (what processes of ddp_spawn and "
            "ddp_notebook log stays with them: plot there, or from a checkpoint)"
        )
    if ax is None:
        _, ax = plt.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    ax = list(ax) if isinstance(ax, Iterable) else [ax]
    if len(ax) != 2:
        raise ValueError(f"ax must be two axes, for the norms and for the penalties, got {len(ax)}")
    keys = dict.fromkeys(key for record in history for key in record if key.endswith("/l2_norm"))
    names = [key.removeprefix(f"{prefix}/").removesuffix("/l2_norm") for key in keys]
    colors = plt.get_cmap("tab10" if len(names) <= 10 else "turbo")
    style = {name: colors(i if len(names) <= 10 else i / (len(names) - 1)) for i, name in enumerate(names)}
    norms, penalties = ax
    # The total, wide and pale, lies under the groups: where one group makes up most of it, both stay visible.
    _draw(penalties, history, f"{prefix}/total/penalty", label="total", color="lightgray", linewidth=6)
    for name in names:
        _draw(norms, history, f"{prefix}/{name}/l2_norm", label=name, color=style[name], marker="o", markersize=3)
        _draw(penalties, history, f"{prefix}/{name}/penalty", label=name, color=style[name], marker="o", markersize=3)
    norms.set_ylabel("L2 norm ‖w‖₂ (unit of the weights)")
    penalties.set_ylabel("penalty ½·λ·‖w‖₂² (unit of the loss)")
    penalties.set_xlabel("time (optimizer steps)")
    for axes in ax:
        _finish(axes)
    return norms.figure, ax


def _draw(axes: Any, history: Sequence[dict[str, float]], key: str, **style: Any) -> None:
    """A line of one figure over time."""
    points = [(record["step"], record[key]) for record in history if key in record]
    axes.plot(*zip(*points), **style)


def _finish(axes: Any) -> None:
    """Scale, grid and legend; a logarithmic scale where a linear one would press small groups onto the axis."""
    values = [abs(value) for line in axes.get_lines() for value in line.get_ydata() if math.isfinite(value) and value]
    if values and max(values) > _LINEAR_SPAN * min(values):
        axes.set_yscale("symlog", linthresh=min(values))  # has a place for zero, the penalty of groups without decay
        axes.set_ylim(bottom=-0.3 * min(values))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
