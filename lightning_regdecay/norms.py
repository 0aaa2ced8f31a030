"""Norms of groups: ``GroupL2Norm``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from lightning_regdecay.parameters import local_part

_ROW = 128
"""Elements whose squares are added in float32: few enough that the sum is right to 1e-6 for any data. Longer sums are
not, though random numbers hide it, as their rounding errors cancel: `torch.dot` of 2^18 equal values is 3e-5 off."""
_PIECE = {torch.float32: 2**21, torch.float16: 2**16, torch.bfloat16: 2**16}
"""Elements per call. Half types are converted to float32 first, 0.25 MiB of it: all scratch memory is under 1 MiB."""
_MOST_NORMS = 2**15
"""Norms of rows that are kept before they are added up: 0.125 MiB, as much in one piece, twice that as float64."""
_WIDENED_PIECE = 2**16
"""Elements per call as float64: 0.5 MiB."""
_COPIED_PIECE = 2**15
"""Elements that are copied at a time out of a tensor with gaps in memory, the last ones of which are still there."""
_TINY_SQUARE = 1e-31
"""Mean square below which float32 squares may have lost bits to underflow (the smallest normal one is 1.2e-38)."""


class GroupL2Norm(Metric):
    """The L2 norm of groups of tensors, ``sqrt(sum |w|²)`` over all elements of a group.

    Args:
        groups: the names of the groups.
        kwargs: options of :class:`torchmetrics.Metric`.

    ``update({name: tensors})`` adds tensors of any shape, device and floating or complex type to groups, ``compute()``
    returns ``{name: norm}`` as 0-d float64 tensors. The relative error is at most 1e-6 for float32 and 1e-5 for half
    types (against their stored values) at any size; no tensor is copied as a whole. NaN and infinity come out as they
    are.

    Of a sharded tensor (a ``DTensor``, a parameter under FSDP1 or DeepSpeed ZeRO-3) each process adds the part that it
    holds; ``compute()`` then adds up the parts, in one all-reduce of one number per group over all processes, each of
    which must take part and hold a part of every group. Where nothing is sharded, as under DDP, every process has the
    whole and asks no other.

    Raises:
        TypeError: for anything but a list of names.
        ValueError: for names that are not unique.

    >>> metric = GroupL2Norm(["bias", "weight"])
    >>> metric.update({"bias": [torch.tensor([3.0, 4.0])], "weight": [torch.ones(8, 2)]})
    >>> {name: norm.item() for name, norm in metric.compute().items()}
    {'bias': 5.0, 'weight': 4.0}
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    sums_of_squares: Tensor

    def __init__(self, groups: Iterable[str], **kwargs: Any) -> None:
        synchronisation = {"dist_sync_fn": self._add_up_shards, "distributed_available_fn": self._is_sharded}
        super().__init__(**{**synchronisation, **kwargs})
        if isinstance(groups, str):
            raise TypeError(f"groups must be a list of names, got the text {groups!r}; write [{groups!r}]")
        if not isinstance(groups, Iterable):
            raise TypeError(f"groups must be a list of names, got {groups!r}")
        self.groups = tuple(groups)
        if len(set(self.groups)) != len(self.groups):
            raise ValueError(f"group names must be unique, got {list(self.groups)}")
        # Of the tensors that this process has whole, and of those it has a part of.
        self.add_state("sums_of_squares", torch.zeros(2, len(self.groups), dtype=torch.float64), dist_reduce_fx="sum")
        self._shard_device: torch.device | None = None

    def update(self, tensors: Mapping[str, Iterable[Tensor]]) -> None:
        """Add tensors to groups.

        Args:
            tensors: group name to tensors of any shape.

        Raises:
            TypeError: for anything but a mapping to lists of tensors.
            ValueError: for an unknown group.
        """
        if not isinstance(tensors, Mapping):
            raise TypeError(f"update takes a mapping of group names to tensors, got {type(tensors).__name__}")
        unknown = [name for name in tensors if name not in self.groups]
        if unknown:
            raise ValueError(f"unknown groups {unknown}; this metric was made with {list(self.groups)}")
        parts: list[list[Tensor]] = []
        places: list[tuple[int, int, float]] = []  # row and column of the state, and the weight there
        for name, members in tensors.items():
            if isinstance(members, Tensor) or not isinstance(members, Iterable):
                # Rows of a tensor would pass for tensors, and those of a shard for whole ones.
                raise TypeError(
                    f"group {name!r} must get a list of tensors, got {type(members).__name__}; write [tensor]"
                )
            by_shards: dict[int, list[Tensor]] = {}
            for tensor in members:
                part, shards = local_part(tensor)
                by_shards.setdefault(shards, []).append(part)
            for shards, of_group in by_shards.items():
                parts.append(of_group)
                # The same part lies on world size / shards processes, and counts once in the sum over all.
                weight = shards / dist.get_world_size(self.process_group) if shards > 1 else 1.0
                places.append((int(shards > 1), self.groups.index(name), weight))
                if shards > 1:
                    self._shard_device = of_group[0].device
        added = torch.zeros_like(self.sums_of_squares, device="cpu")
        for (row, column, weight), value in zip(places, _sums_of_squares(parts)):
            added[row, column] += weight * value
        # Not in place, as the state may be an inference tensor.
        self.sums_of_squares = self.sums_of_squares + added.to(self.sums_of_squares.device)

    def compute(self) -> dict[str, Tensor]:
        """The norm of every group.

        Returns:
            Group name to norm, a 0-d float64 tensor.
        """
        return dict(zip(self.groups, self.sums_of_squares.sum(dim=0).sqrt().unbind()))

    def _is_sharded(self) -> bool:
        return self._shard_device is not None

    def _add_up_shards(self, state: Tensor, group: Any = None) -> list[Tensor]:
        """The state with the shards of all processes, in a list as torchmetrics' own synchronisation returns it."""
        whole, shards = state.unbind()
        shards = shards.to(self._shard_device, copy=True)  # NCCL takes tensors of its device only
        dist.all_reduce(shards, group=group)
        return [torch.stack([whole, shards.to(whole.device)])]

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot the norms as torchmetrics does.

        Args:
            val: results of ``compute``, one or a list of them over time; by default the present one.
            ax: matplotlib axes to draw on.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: without matplotlib.
        """
        return self._plot(val, ax)


def _sums_of_squares(groups: Sequence[Iterable[Tensor]]) -> list[float]:
    """The sum of |x|² of each group, with one transfer to the host per device."""
    parts: dict[tuple[int, torch.device], list[Tensor]] = {}
    for index, tensors in enumerate(groups):
        for tensor in tensors:
            parts.setdefault((index, tensor.device), []).append(tensor)
    sums = _to_host([_fast_sum_of_squares(of_part) for of_part in parts.values()])
    for at, of_part in enumerate(parts.values()):
        if not _TINY_SQUARE * sum(map(torch.numel, of_part)) < sums[at] < math.inf:
            # float32 squares overflow from 1.8e19 and lose bits below 1e-19; all zeros look like the latter.
            sums[at] = _to_host([_exact_sum_of_squares(of_part)])[0]
    of_group = [[value for (i, _), value in zip(parts, sums) if i == index] for index in range(len(groups))]
    return [sum(values) for values in of_group]


def _to_host(values: Sequence[Tensor]) -> list[float]:
    """0-d tensors as numbers, one transfer per device."""
    by_device: dict[torch.device, list[int]] = {}
    for index, value in enumerate(values):
        by_device.setdefault(value.device, []).append(index)
    numbers = [0.0] * len(values)
    for indices in by_device.values():
        for index, number in zip(indices, torch.stack([values[i] for i in indices]).tolist()):
            numbers[index] = number
    return numbers


def _fast_sum_of_squares(tensors: Iterable[Tensor]) -> Tensor:
    """At the speed of memory: float32 within rows of 128, float64 across them."""
    sums: list[Tensor] = []
    norms: list[Tensor] = []  # of rows, and single elements, which are their own norms
    kept = 0
    for piece in (piece for tensor in tensors for piece in _flat(tensor)):
        if piece.dtype not in _PIECE:
            sums.append(_exact_sum_of_squares([piece]))
            continue
        for part in torch.split(piece, _PIECE[piece.dtype]) if piece.numel() > _PIECE[piece.dtype] else [piece]:
            part = part.to(torch.float32)
            in_rows = part.numel() // _ROW * _ROW
            if in_rows:
                norms.append(torch.linalg.vector_norm(part[:in_rows].view(-1, _ROW), dim=1))
            if in_rows < part.numel():
                norms.append(part[in_rows:].clone())  # a view would keep what was converted or copied alive
            kept += part.numel() // _ROW + _ROW
            if kept > _MOST_NORMS:
                sums.append(_dot(torch.cat(norms)))
                norms.clear()
                kept = 0
    if norms or not sums:
        sums.append(_dot(torch.cat(norms)) if norms else torch.zeros((), dtype=torch.float64))
    return torch.stack(sums).sum()


def _exact_sum_of_squares(tensors: Iterable[Tensor]) -> Tensor:
    """In float64 throughout, for what float32 cannot hold."""
    pieces = (piece for tensor in tensors for piece in _flat(tensor))
    return torch.stack([_dot(part) for piece in pieces for part in torch.split(piece, _WIDENED_PIECE)]).sum()


def _dot(vector: Tensor) -> Tensor:
    # Apple's MPS has no float64.
    wide = (vector.cpu() if vector.device.type == "mps" else vector).to(torch.float64)
    return torch.dot(wide, wide)


def _flat(tensor: Tensor) -> Iterator[Tensor]:
    """The elements of a tensor as 1-d views, in the order of memory, which needs no copy; a norm asks for no other."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.ndim > 1:
        tensor = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))  # channels_last and such
    if tensor.ndim <= 1 or tensor.is_contiguous():
        yield tensor.reshape(-1)
    elif tensor[0].numel() > _COPIED_PIECE:
        for row in tensor:
            yield from _flat(row)
    else:  # gaps in memory: copied, a few rows at a time
        for rows in torch.split(tensor, _COPIED_PIECE // max(tensor[0].numel(), 1)):
            yield rows.reshape(-1)
