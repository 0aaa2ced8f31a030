"""The events that a monitor has logged: how many are kept, as rows, and what they say at the end of a run."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple

from lightning_regdecay.groups.tables import Table
from lightning_regdecay.rules.names import TOTAL

MOST_EVENTS = 1000
"""Events that are kept: some 100 KB for each figure of ten groups."""
_SOON = 50
"""Steps within which weights that decay to their half do so in a hurry."""

Record = dict[str, float]


class Thinning:
    """Keeps at most ``MOST_EVENTS`` of a growing list, evenly spaced, the first and the last always.

    When it is full every other one goes, and of those that come only every second, then every fourth, and so on, stays.
    """

    def __init__(self) -> None:
        self.seen = 0
        """Events so far."""
        self.stride = 1
        """Which of them stay."""

    def append(self, records: list[Record], record: Record) -> None:
        """Add an event to a list."""
        if records and (self.seen - 1) % self.stride:
            records.pop()  # which was there as the last
        records.append(record)
        self.seen += 1
        if len(records) > MOST_EVENTS:
            records[:] = [*records[:-1:2], *records[-1:]] if len(records) % 2 == 0 else records[::2]
            self.stride *= 2

    def state(self) -> dict[str, int]:
        """As plain data."""
        return {"seen": self.seen, "stride": self.stride}

    def load(self, state: Mapping[str, Any], records: list[Record]) -> None:
        """Take up a state, of a checkpoint that may have none."""
        self.seen = int(state.get("seen", len(records)))
        self.stride = int(state.get("stride", 1))


class KeyPlace(NamedTuple):
    """What a key of an event stands for."""

    group: str
    figure: str


def place_of(key: str, prefix: str) -> KeyPlace | None:
    """What a key stands for, None for one that is not under the prefix.

    >>> place_of("decay/Adam/head/l2_norm", "decay")
    KeyPlace(group='Adam/head', figure='l2_norm')
    """
    if not key.startswith(f"{prefix}/"):
        return None
    group, _, figure = key.removeprefix(f"{prefix}/").rpartition("/")
    return KeyPlace(group, figure)


def rows(records: Iterable[Record], prefix: str) -> list[dict[str, Any]]:
    """The events with a row for each group: ``epoch``, ``step``, ``group``, and the figures by their names."""
    found = []
    for record in records:
        by_group: dict[str, dict[str, Any]] = {}
        for key, value in record.items():
            if (place := place_of(key, prefix)) is not None:
                by_group.setdefault(place.group, {})[place.figure] = value
        when = {"epoch": record.get("epoch"), "step": record.get("step")}
        found += [{**when, "group": group, **figures} for group, figures in by_group.items()]
    return found


class Exposure:
    """How much decay reached each group of a run: the sum of lr·λ over its steps, by the trapezoids between events."""

    def __init__(self) -> None:
        self.total: dict[str, float] = {}
        self.highest: dict[str, float] = {}
        self._step = 0
        self._rates: Mapping[str, float] = {}

    def begin(self, step: int, rates: Mapping[str, float]) -> None:
        """Note lr·λ of each group before the first step of a fit."""
        self._step, self._rates = step, rates

    def add(self, step: int, rates: Mapping[str, float]) -> None:
        """Note lr·λ of each group at an event."""
        for name, rate in rates.items():
            before = self._rates.get(name, rate)
            self.total[name] = self.total.get(name, 0.0) + (before + rate) / 2 * (step - self._step)
            self.highest[name] = max(self.highest.get(name, 0.0), before, rate)
        self._step, self._rates = step, rates

    def state(self) -> dict[str, dict[str, float]]:
        """As plain data."""
        return {"total": dict(self.total), "highest": dict(self.highest)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a state, of a checkpoint that may have none."""
        self.total, self.highest = dict(state.get("total", {})), dict(state.get("highest", {}))

    def remark(self, name: str, is_decoupled: bool) -> str:
        """What is worth a sentence of the decay of a group, empty where nothing is."""
        if name not in self.total:
            return ""
        total, highest = self.total[name], self.highest[name]
        if not highest:
            return "no decay reached it"
        if not is_decoupled:
            return ""
        half_life = math.log(2) / highest
        if half_life < _SOON:
            return f"decay alone halves it in {max(round(half_life), 1)} steps"
        if total < 1:
            return f"decay alone took {-math.expm1(-total):.0%}: the run is too short for its norm to come to rest"
        return ""


def end_table(records: list[Record], prefix: str, exposure: Exposure, decoupled: Container[str]) -> Table:
    """The first and the last norm of each group, and what is off, from the events of a run.

    Args:
        records: the events.
        prefix: the first part of the keys.
        exposure: the decay that reached the groups.
        decoupled: the groups whose weights decay beside the gradient step.
    """
    by_group: dict[str, list[dict[str, Any]]] = {}
    for row in rows(records, prefix):
        if row["group"] != TOTAL:
            by_group.setdefault(row["group"], []).append(row)
    cells = []
    for name, events in by_group.items():
        bad = next((event["step"] for event in events if not _is_finite(event)), None)
        remark = exposure.remark(name, name in decoupled) if bad is None else f"NaN or infinity since step {bad}"
        at_rest = events[-1].get("equilibrium")
        first, last = (_cell(event.get("l2_norm")) for event in (events[0], events[-1]))
        cells.append([name, first, last, _cell(at_rest), remark])
    header = ("group", "first norm", "last norm", "rms / at rest", "remark")
    return Table(header, cells, left=1, has_total=False, title="Weight decay in this run", text_at_end=True)


def _is_finite(event: Mapping[str, Any]) -> bool:
    return all(math.isfinite(value) for value in event.values() if isinstance(value, float))


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
