"""Rows of tables of groups, and how many parameters there are."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from lightning_regdecay.groups.regions import Region
from lightning_regdecay.groups.shards import original_shape
from lightning_regdecay.rules.names import TOTAL

TABLE_HEADER = ("group", "rule", "tensors", "parameters", "weight_decay", "lr")


def table_row(
    name: str,
    rule: str,
    parameters: Iterable[Any],
    weight_decay: object,
    lr: object,
    regions: Iterable[Region | None] | None = None,
) -> list[str]:
    """The cells of one group in a table under ``TABLE_HEADER``."""
    parameters = list(parameters)
    size = numel_of(parameters, regions)
    return [name, rule, f"{len(parameters):,}", f"{size:,}", _cell(weight_decay), _cell(lr)]


def total_row(parameters: Iterable[Any]) -> list[str]:
    """The last row of a table under ``TABLE_HEADER``."""
    return table_row(TOTAL, "", parameters, "", "")


def numel_of(parameters: Iterable[Any], regions: Iterable[Region | None] | None = None) -> int:
    """The number of scalar parameters, of the whole parameters where they are sharded; of parts of them, if any."""
    shapes = map(original_shape, parameters)
    every = itertools.repeat(None) if regions is None else regions
    return sum(shape.numel() if region is None else region.numel(shape) for shape, region in zip(shapes, every))


def bytes_text(size: float) -> str:
    """A size of memory.

    >>> bytes_text(900), bytes_text(3 * 2**20)
    ('900 B', '3 MiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"


def _cell(value: object) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)
