"""How things are timed and printed: both sides in turn in one run, medians, ratios."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from statistics import median
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """One comparison: a ratio of ours to theirs, or a figure of ours alone."""

    what: str
    on: str
    ours: str
    peer: str = ""
    theirs: str = ""
    ratio: float | None = None
    goal: str = ""
    """What was to be reached, of the ratio where there is one."""
    error: float | None = None
    """Of ours, relative, against float64."""
    their_error: float | None = None


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rounds: int
    elements: int
    """Of the largest tensor."""
    mixed: int
    """Elements of the largest of the tensors of mixed sizes."""
    tensors: int
    """Of the largest model whose groups are resolved."""
    small: bool


FULL = Sizes(rounds=15, elements=10**9, mixed=10**7, tensors=100_000, small=False)
SMALL = Sizes(rounds=1, elements=10**5, mixed=10**3, tensors=100, small=True)
"""To see that the benchmarks run."""


def seconds_in_turn(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median time of each call; all take their turn in every round, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: median(of_name) for name, of_name in times.items()}


def against(
    what: str,
    on: str,
    seconds: Mapping[str, float],
    ours: str,
    goals: Mapping[str, str],
    errors: Mapping[str, float] | None = None,
) -> Iterator[Row]:
    """A row for each peer."""
    errors = errors or {}
    for peer, theirs in seconds.items():
        if peer != ours:
            yield Row(
                what,
                on,
                time_text(seconds[ours]),
                peer,
                time_text(theirs),
                seconds[ours] / theirs,
                goals.get(peer, ""),
                errors.get(ours),
                errors.get(peer),
            )


def time_text(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def machine() -> str:
    cores = f"{torch.get_num_threads()} threads of {platform.machine()}"
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{date.today()}, torch {torch.__version__}, Python {platform.python_version()}, {cores}{gpu}"


HEADER = ("what", "on", "ours", "peer", "theirs", "ratio", "to reach", "error", "their error")
_TEXTS = (0, 1, 3)  # columns of words; the others hold figures


def table(rows: Iterable[Row], markdown: bool = False) -> str:
    """Words to the left and figures to the right; as plain text, or as Markdown without what was to be reached."""
    cells = [HEADER, *map(_cells, rows)]
    if markdown:
        cells = [(*row[:6], *row[7:]) for row in cells]
        rule = tuple("---" if i in _TEXTS else "---:" for i in range(len(cells[0])))
        return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:]))
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        "  ".join(c.ljust(w) if i in _TEXTS else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cells(row: Row) -> tuple[str, ...]:
    def figure(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    ratio = figure(row.ratio, ".2g" if (row.ratio or 0) < 0.1 else ".2f" if (row.ratio or 0) < 10 else ".0f")
    errors = figure(row.error, ".0e"), figure(row.their_error, ".0e")
    return row.what, row.on, row.ours, row.peer, row.theirs, ratio, row.goal, *errors
