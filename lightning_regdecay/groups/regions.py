"""Parts of tensors: which elements a rule means, and those of them that this process holds."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_regdecay.groups.parameters import ModelParameter, class_of
from lightning_regdecay.groups.shards import flat_place, local_part, original_shape
from lightning_regdecay.rules.regions import PADDING, names_of, slice_from
from lightning_regdecay.rules.rules import DecayRule
from lightning_regdecay.rules.scalars import is_array

_MOST_RANGES = 64
"""Ranges up to which each is a view; more are gathered in one call."""

Range: TypeAlias = tuple[int, int]
"""Where something begins, and where it has ended."""


@dataclass(frozen=True)
class Region:
    """Some slices of a tensor along one of its dimensions.

    Args:
        dim: the dimension.
        size: that of the whole tensor along it.
        ranges: where they lie, in order and apart from each other.
        label: what the user calls them.
    """

    dim: int
    size: int
    ranges: tuple[Range, ...]
    label: str = ""

    @functools.cached_property
    def selection(self) -> Selection:
        """Where it lies in the whole tensor."""
        return _selection(self.dim, self.ranges)

    @property
    def count(self) -> int:
        """How many slices there are."""
        return sum(stop - start for start, stop in self.ranges)

    @property
    def text(self) -> str:
        """Where it lies, in a few words."""
        along = "rows" if self.dim == 0 else f"slices of dim {self.dim}"
        shown = [f"{start}:{stop}" if stop - start > 1 else f"{start}" for start, stop in self.ranges[:3]]
        return f"{along} {', '.join(shown)}{', …' if len(self.ranges) > 3 else ''}"

    def numel(self, shape: torch.Size) -> int:
        """The elements of a tensor of some shape that are in it."""
        return shape.numel() // max(self.size, 1) * self.count

    def joined(self, other: Region) -> Region:
        """Both, which have nothing in common."""
        labels = ", ".join(dict.fromkeys(label for label in (self.label, other.label) if label))
        return Region(self.dim, self.size, _merged([*self.ranges, *other.ranges]), labels)

    def without(self, other: Region) -> Region:
        """What is in this one and not in the other; nothing along another dimension, where that is no slices."""
        if self.dim != other.dim:
            return NOTHING
        left = rest_of([other])
        return Region(self.dim, self.size, tuple(_common(self.ranges, left.ranges)) if left else (), self.label)

    def common(self, other: Region) -> Region:
        """What is in both, along one dimension; ``NOTHING`` where nothing is."""
        ranges = tuple(_common(self.ranges, other.ranges))
        return Region(self.dim, self.size, ranges) if ranges else NOTHING

    def overlaps(self, other: Region) -> bool:
        """Whether two regions of one tensor have elements in common; those along other dimensions always have."""
        return self.dim != other.dim or bool(_common(self.ranges, other.ranges))


NOTHING = Region(0, 0, ())
"""No slice at all."""


def rest_of(regions: Iterable[Region]) -> Region | None:
    """What some regions of one tensor leave, None where that is nothing."""
    taken = list(regions)
    ends = _merged([pair for region in taken for pair in region.ranges])
    starts = [0, *(stop for _, stop in ends)]
    stops = [*(start for start, _ in ends), taken[0].size]
    left = tuple((start, stop) for start, stop in zip(starts, stops) if start < stop)
    return Region(taken[0].dim, taken[0].size, left) if left else None


class _Misfit(ValueError):
    """A parameter does not have what a rule takes of it."""


def region_of(rule: DecayRule, parameter: ModelParameter) -> Region | None:
    """The part of a parameter that a rule takes, None where it takes nothing of it.

    Raises:
        ValueError: for a dimension that it does not have, rows out of range, blocks that it is not made of.
        RuntimeError: where a function of the user's fails.
    """
    label = f"{rule.KIND} {rule.selector_text!r} does not fit {parameter.name!r}, of shape {tuple(parameter.shape)}"
    dim, ndim = rule.dim or 0, parameter.ndim
    try:
        if not -ndim <= dim < ndim:
            raise _Misfit(f"it has no dimension {dim}")
        dim %= ndim
        size = parameter.shape[dim]
        ranges = _block_range(rule, size) if rule.given_blocks is not None else _row_ranges(rule, parameter, size)
    except _Misfit as error:
        if rule.optional:
            return None
        raise ValueError(f"{label}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None
    return Region(dim, size, ranges, _label(rule)) if ranges else None


def _label(rule: DecayRule) -> str:
    rows = rule.given_rows
    return rule.block or (rows if isinstance(rows, str) else "")


def _block_range(rule: DecayRule, size: int) -> tuple[Range, ...]:
    blocks = rule.given_blocks
    assert blocks is not None
    names = names_of(blocks)
    if isinstance(blocks, dict):
        sizes = list(blocks.values())
        if sum(sizes) > size:
            raise _Misfit(f"its blocks are {sum(sizes)} in all, and the dimension is {size}")
    elif size % len(names):
        raise _Misfit(f"a dimension of {size} has no {len(names)} equal blocks; give each its size")
    else:
        sizes = [size // len(names)] * len(names)
    number = names.index(str(rule.block))
    return ((sum(sizes[:number]), sum(sizes[: number + 1])),)


def _row_ranges(rule: DecayRule, parameter: ModelParameter, size: int) -> tuple[Range, ...]:
    rows = rule.given_rows
    if rows == PADDING:
        found = (getattr(place.module, "padding_idx", None) for place in parameter.places)
        return _merged([(number, number + 1) for number in found if number is not None])
    if isinstance(rows, str):
        return _merged([pair for text in rows.split(",") for pair in _slice_ranges(text, size)])
    if callable(rows):
        return _from_mask(rows, parameter, size)
    return _merged([(_in_range(number, size), _in_range(number, size) + 1) for number in rows or ()])


def _slice_ranges(text: str, size: int) -> list[Range]:
    wanted = slice_from(text)
    if isinstance(wanted, int):
        return [(_in_range(wanted, size), _in_range(wanted, size) + 1)]
    for number in (wanted.start, wanted.stop):
        if number is not None and not -size <= number <= size:
            raise _Misfit(f"rows {text.strip()!r} go beyond the {size} that there are")
    numbers = range(size)[wanted]
    if not len(numbers):
        raise _Misfit(f"rows {text.strip()!r} are none of the {size} that there are")
    if numbers.step == 1:
        return [(numbers.start, numbers.stop)]
    return [(number, number + 1) for number in numbers]


def _in_range(number: int, size: int) -> int:
    if not -size <= number < size:
        raise _Misfit(f"row {number} is not among the {size} that there are")
    return number % size


def _from_mask(rows: Callable[..., Any], parameter: ModelParameter, size: int) -> tuple[Range, ...]:
    try:
        mask = rows(parameter.name, parameter.shape)
    except Exception as error:
        raise RuntimeError(
            f"the function for rows failed on parameter {parameter.name!r} of {class_of(parameter.module).__name__}: "
            f"{type(error).__name__}: {error}"
        ) from error
    entries = mask.tolist() if isinstance(mask, Tensor) or is_array(mask) else list(mask)
    shape = getattr(mask, "shape", (len(entries),))
    if tuple(shape) != (size,) or not all(entry in (True, False) for entry in entries):
        raise ValueError(
            f"its function must give a mask of {size} entries, True or False for each row, and gave one of shape "
            f"{tuple(shape)}, or of other values"
        )
    return _merged([(number, number + 1) for number, entry in enumerate(entries) if entry])


def _merged(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The same slices in as few ranges as can be."""
    found: list[Range] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return tuple(found)


def _common(a: Sequence[Range], b: Sequence[Range]) -> list[Range]:
    """The slices in both; each of them in order."""
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, stop = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < stop:
            found.append((start, stop))
        if a[i][1] <= b[j][1]:
            i += 1
        else:
            j += 1
    return found


def _numbers(ranges: Sequence[Range]) -> Tensor:
    """Those of all slices."""
    starts, stops = torch.tensor(ranges, dtype=torch.int64).view(-1, 2).unbind(1)
    lengths = stops - starts
    before = torch.cumsum(lengths, 0) - lengths
    return torch.repeat_interleave(starts - before, lengths) + torch.arange(int(lengths.sum()))


class Selection(NamedTuple):
    """The elements of what a process holds of a tensor that are in a region: slices along a dimension."""

    dim: int
    ranges: tuple[Range, ...]
    numbers: Tensor | None = None
    """Of the slices instead, where there are many ranges."""

    def parts(self, tensor: Tensor) -> list[Tensor]:
        """These elements of a tensor: views, or a copy where they lie in many places."""
        if self.numbers is not None:
            return [tensor.index_select(self.dim, self.numbers.to(tensor.device))]
        return [tensor.narrow(self.dim, start, stop - start) for start, stop in self.ranges]

    def change(self, act: Callable[..., Any], tensor: Tensor, *others: Tensor) -> None:
        """Change these elements of a tensor in place, by a function of them and of those of other tensors."""
        for part, *rest in zip(*(self.parts(one) for one in (tensor, *others))):
            act(part, *rest)
            if self.numbers is not None:
                tensor.index_copy_(self.dim, self.numbers.to(tensor.device), part)


_selections: Any = WeakTensorKeyDictionary()
"""From parameter to what was found of its regions, with what it was then: how it lies, and which part is here."""


def selection(parameter: Tensor, region: Region | None) -> Selection | None:
    """Where a region lies in what this process holds of a parameter, None for all of that.

    No process is asked: how a parameter is cut, each knows.
    """
    if region is None:
        return None
    flat = flat_place(parameter)
    if flat is None and not hasattr(parameter, "device_mesh"):
        return region.selection
    lies = flat, getattr(parameter, "placements", None), parameter.shape
    known = _selections.get(parameter)
    if known is None or known[0] != lies:
        known = _selections[parameter] = lies, {}
    if id(region) not in known[1]:
        if flat is not None:
            found = _of_flat(region, original_shape(parameter), flat)
        else:
            found = _selection(region.dim, _within(_held(parameter, region.dim, region.size), region.ranges))
        known[1][id(region)] = region, found
    return known[1][id(region)][1]  # type: ignore[no-any-return]


def _held(parameter: Any, dim: int, size: int) -> tuple[Range, ...]:
    """The slices of the whole along a dimension that this process has, in the order that it has them in."""
    ranges: tuple[Range, ...] = ((0, size),)
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return ranges
    place = mesh.get_coordinate()
    cuts = [(number, p) for number, p in enumerate(parameter.placements) if p.is_shard() or hasattr(p, "split_factor")]
    # FSDP2 cuts what tensor parallelism, further right in the mesh, has cut already: `_StridedShard`.
    for number, placement in sorted(cuts, key=lambda cut: hasattr(cut[1], "split_factor")):
        if placement.dim % parameter.ndim == dim:
            ranges = _chunk(ranges, mesh.size(number), place[number])
    return ranges


def _chunk(ranges: Iterable[Range], count: int, number: int) -> tuple[Range, ...]:
    """One of so many parts, as ``torch.chunk`` makes them."""
    ranges = list(ranges)
    total = sum(stop - start for start, stop in ranges)
    size = -(-total // count)
    return _cut(ranges, number * size, min((number + 1) * size, total))


def _cut(ranges: Iterable[Range], first: int, end: int) -> tuple[Range, ...]:
    """The slices from the number ``first`` to before ``end``, counted over all ranges."""
    found, before = [], 0
    for start, stop in ranges:
        low, high = max(start, start + first - before), min(stop, start + end - before)
        if low < high:
            found.append((low, high))
        before += stop - start
    return tuple(found)


def _within(held: Iterable[Range], wanted: tuple[Range, ...]) -> tuple[Range, ...]:
    """Where wanted slices lie, counted over those that are held."""
    found, before = [], 0
    for start, stop in held:
        found += [(before + low - start, before + high - start) for low, high in _common([(start, stop)], wanted)]
        before += stop - start
    return _merged(found)


def _of_flat(region: Region, shape: torch.Size, flat: Range) -> Selection:
    """The same in a part of a parameter that was flattened, from one element to before another."""
    inner = math.prod(shape[region.dim + 1 :])
    outer = math.prod(shape[: region.dim])
    if outer * len(region.ranges) <= _MOST_RANGES:
        whole = (
            ((row * region.size + start) * inner, (row * region.size + stop) * inner)
            for row in range(outer)
            for start, stop in region.ranges
        )
        return Selection(0, _within([flat], _merged(whole)))
    is_wanted = torch.zeros(region.size, dtype=torch.bool)
    for start, stop in region.ranges:
        is_wanted[start:stop] = True
    slices = torch.arange(*flat) // inner % region.size
    return Selection(0, (), is_wanted[slices].nonzero().view(-1))


def _selection(dim: int, ranges: Sequence[Range]) -> Selection:
    ranges = tuple(ranges)
    if len(ranges) <= _MOST_RANGES:
        return Selection(dim, ranges)
    return Selection(dim, (), _numbers(ranges))


def held_parts(parameter: Tensor, region: Region | None, values: Tensor | None = None) -> Iterator[tuple[Tensor, int]]:
    """What this process holds of a region of a parameter, in parts, and into how many the whole is cut among processes.

    Args:
        parameter: the parameter.
        region: the region, None for all of it.
        values: what this process holds of something that is cut as the parameter is; by default of itself.
    """
    own, shards = local_part(parameter)
    part = own if values is None else values
    where = selection(parameter, region)
    parts = [part] if where is None else where.parts(part)
    for one in parts or [part.new_empty(0)]:  # where it holds nothing, it takes part all the same
        yield one, shards


def local_slice(parameter: Tensor, whole: Tensor) -> Tensor:
    """What this process would hold of a whole tensor, were it cut as a parameter is. No process is asked."""
    flat = flat_place(parameter)
    if flat is not None:
        return whole.reshape(-1)[flat[0] : flat[1]]
    for dim, size in enumerate(whole.shape):
        held = _held(parameter, dim, size)
        if held != ((0, size),):
            parts = [whole.narrow(dim, start, stop - start) for start, stop in held]
            whole = torch.cat(parts, dim) if parts else whole.narrow(dim, 0, 0)
    return whole
