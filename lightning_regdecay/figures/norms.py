"""Norms of groups: ``GroupL2Norm``."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from lightning_regdecay.groups.shards import local_part

HALF = (torch.float16, torch.bfloat16)
ROW = 128
"""Elements whose squares are added in float32: few enough that the sum is right to 1e-6 for any data. Longer sums are
not, though random numbers hide it, as their rounding errors cancel: `torch.dot` of 2^18 equal values is 3e-5 off."""
_ROW_OF_NORMS = 32
"""The same for norms of rows, which are rounded already."""
ROWS = 2**14
"""Rows per call: 64 KiB of norms. Twice that may come from the kernel each time, page by page, which is slow."""
_MOST_NORMS = 2**13
"""Norms that are kept before they are added up in float64."""
_HALF_ROW = 2**10
"""The same as `ROW` for half types, of which 1e-5 is asked."""
_WIDENED_ROWS = 2**9
"""Rows of half types per call where torch makes float32 of them: 0.5 MiB, as all scratch memory is under 1 MiB."""
_FEW = 2**10
"""Elements up to which a tensor is not worth a call of its own."""
_SMALL = 2**13
"""Elements up to which a tensor is copied together with others of its group, as a call costs more than that."""
_JOINED = 2**15
"""Elements of small tensors from which on they are copied together: little more than 128 KiB as float32."""
_WIDENED_PIECE = 2**16
"""Elements per call as float64: 0.5 MiB."""
_COPIED_PIECE = 2**15
"""Elements that are copied at a time out of a tensor with gaps in memory, the last ones of which are still there."""
GPU_PIECE = 2**22
"""Elements per norm on a GPU: `torch._foreach_norm` takes room for as many tensors as it gets, each the longest."""
_TINY_SQUARE = 1e-31
"""Mean square below which float32 squares may have lost bits to underflow (the smallest normal one is 1.2e-38)."""


class Part(NamedTuple):
    """What this process holds of a tensor."""

    values: Tensor
    shards: int
    """Into how many parts the whole is cut among all processes."""


class LocalSums(NamedTuple):
    """The sums of squares of a group on this process."""

    whole: float
    """Of the tensors that it has whole."""
    sharded: float
    """Of those that it has a part of, to be added up over all processes."""
    device: torch.device | None
    """Where such parts are, None without."""


class Pieces(NamedTuple):
    """What is measured in the place of a tensor, which is not to be there as a whole; the same whenever asked for."""

    fast: Callable[[Tensor], Iterable[Tensor]]
    """Tells tensors that have its norm together, such as norms of its rows."""
    exact: Callable[[Tensor], Iterable[Tensor]]
    """Tells its elements, for values whose squares float32 cannot hold."""


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
        zeros = torch.zeros(2, len(self.groups), dtype=torch.float64, device="cpu")
        self.add_state("sums_of_squares", zeros, dist_reduce_fx="sum")
        self._shard_device: torch.device | None = None

    def reset(self) -> None:
        """Start anew."""
        super().reset()
        self._shard_device = None

    def update(self, tensors: Mapping[str, Iterable[Tensor]]) -> None:
        """Add tensors to groups.

        Args:
            tensors: group name to tensors of any shape.

        Raises:
            TypeError: for anything but a mapping to lists of tensors, with strides or sparse.
            ValueError: for an unknown group.
        """
        if not isinstance(tensors, Mapping):
            raise TypeError(f"update takes a mapping of group names to tensors, got {type(tensors).__name__}")
        columns = {name: column for column, name in enumerate(self.groups)}
        unknown = [name for name in tensors if name not in columns]
        if unknown:
            raise ValueError(f"unknown groups {unknown}; this metric was made with {list(self.groups)}")
        members_of: dict[str, list[Part]] = {}
        for name, members in tensors.items():
            if isinstance(members, Tensor) or not isinstance(members, Iterable):
                # Rows of a tensor would pass for tensors, and those of a shard for whole ones.
                raise TypeError(
                    f"group {name!r} must get a list of tensors, got {type(members).__name__}; write [tensor]"
                )
            members_of[name] = []
            for tensor in members:
                if not isinstance(tensor, Tensor):
                    raise TypeError(f"group {name!r} must get tensors, got {type(tensor).__name__} {tensor!r}")
                part = Part(*local_part(tensor))
                if not is_measurable(part.values):
                    raise TypeError(
                        f"group {name!r} must get tensors with strides, or sparse ones, got {part.values.layout}"
                    )
                members_of[name].append(part)
        self.add(local_sums(members_of, self.process_group))

    def add(self, sums: Mapping[str, LocalSums]) -> None:
        """Add sums of squares of this process to groups, see :func:`local_sums`."""
        columns = {name: column for column, name in enumerate(self.groups)}
        added = [[0.0] * len(self.groups) for _ in range(2)]
        for name, of_group in sums.items():
            added[0][columns[name]] += of_group.whole
            added[1][columns[name]] += of_group.sharded
            self._shard_device = of_group.device or self._shard_device
        # Not in place, as the state may be an inference tensor.
        state = self.sums_of_squares
        self.sums_of_squares = state + torch.tensor(added, dtype=state.dtype, device=state.device)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Follow a module to another device, but keep float64 where the module is cast."""
        sums: Tensor = self.sums_of_squares
        applied = super()._apply(fn, *args, **kwargs)
        device = self.sums_of_squares.device
        self.sums_of_squares = sums.new_zeros(sums.shape, device=device) if sums.is_meta else sums.to(device)
        self._defaults["sums_of_squares"] = torch.zeros_like(self.sums_of_squares)
        return applied

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


def local_sums(
    members_of: Mapping[str, Iterable[Part]], process_group: Any = None, pieces: Pieces | None = None
) -> dict[str, LocalSums]:
    """The sums of squares of groups on this process, for :meth:`GroupL2Norm.add`.

    Args:
        members_of: group name to what this process holds of its tensors.
        process_group: the processes over which sums will be added up.
        pieces: of what is measured in the place of the tensors, should they not be measured themselves.
    """
    parts: list[list[Tensor]] = []
    places: list[tuple[str, int, float]] = []
    found = {name: LocalSums(0.0, 0.0, None) for name in members_of}
    for name, members in members_of.items():
        by_shards: dict[int, list[Tensor]] = {}
        for part, shards in members:
            values = part
            if part.layout != torch.strided:
                values = (part.coalesce() if part.layout == torch.sparse_coo else part).values().detach()
            by_shards.setdefault(shards, []).append(values)
        for shards, of_group in by_shards.items():
            parts.append(of_group)
            # The same part lies on world size / shards processes, and counts once in the sum over all.
            places.append((name, shards, shards / dist.get_world_size(process_group) if shards > 1 else 1.0))
    for (name, shards, weight), of_group, value in zip(places, parts, _sums_of_squares(parts, pieces)):
        whole, sharded, device = found[name]
        if shards > 1:
            found[name] = LocalSums(whole, sharded + weight * value, of_group[0].device)
        else:
            found[name] = LocalSums(whole + value, sharded, device)
    return found


def is_measurable(tensor: Tensor) -> bool:
    """Whether a norm can be taken of a tensor."""
    sparse = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
    return tensor.layout == torch.strided or tensor.layout in sparse


@torch.no_grad()
def _sums_of_squares(groups: Sequence[Iterable[Tensor]], pieces: Pieces | None = None) -> list[float]:
    """The sum of |x|² of each group, with one transfer to the host per device."""
    by_device: dict[torch.device, dict[int, list[Tensor]]] = {}
    for index, tensors in enumerate(groups):
        for tensor in tensors:
            by_device.setdefault(tensor.device, {}).setdefault(index, []).append(tensor)
    totals = [0.0] * len(groups)
    for device, parts in by_device.items():
        fast = _by_tensors if device.type == "cuda" else _by_rows
        made = list(parts.values()) if pieces is None else [_each(pieces.fast, some) for some in parts.values()]
        sums = dict(zip(parts, fast(made)))
        # float32 squares overflow from 1.8e19 and lose bits below 1e-19; all zeros look like the latter.
        least = {index: _TINY_SQUARE * sum(map(torch.numel, tensors)) for index, tensors in parts.items()}
        doubtful = [index for index in parts if not least[index] < sums[index] < math.inf]
        if doubtful:
            elements = [parts[i] if pieces is None else _each(pieces.exact, parts[i]) for i in doubtful]
            sums.update(zip(doubtful, torch.stack(list(map(_exact_sum_of_squares, elements))).tolist()))
        for index, value in sums.items():
            totals[index] += value
    return totals


def _each(make: Callable[[Tensor], Iterable[Tensor]], tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    return itertools.chain.from_iterable(map(make, tensors))


def _by_tensors(groups: Sequence[Iterable[Tensor]]) -> list[float]:
    """For a GPU, one multi-tensor call per type for all groups: float32 within 2^22 elements, float64 across them."""
    pieces: dict[torch.dtype, list[tuple[int, Tensor]]] = {}
    for index, tensors in enumerate(groups):
        for tensor in map(_in_memory_order, tensors):
            floating = tensor if tensor.is_floating_point() else tensor.to(torch.float64)
            parts = torch.split(floating.view(-1), GPU_PIECE) if floating.is_contiguous() else [floating]
            pieces.setdefault(floating.dtype, []).extend((index, part) for part in parts)
    norms: list[Tensor] = []
    for dtype, of_type in pieces.items():
        norm_dtype = torch.float32 if dtype in HALF else dtype
        norms += torch._foreach_norm([part for _, part in of_type], 2, dtype=norm_dtype)
    sums = [0.0] * len(groups)
    indices = (index for of_type in pieces.values() for index, _ in of_type)
    for index, norm in zip(indices, torch.stack(norms).tolist()):
        sums[index] += norm * norm
    return sums


def _by_rows(groups: Sequence[Iterable[Tensor]]) -> list[float]:
    """For a CPU, and right anywhere: float32 within rows of up to 256 elements, float64 across them."""
    indices: list[int] = []
    sums: list[Tensor] = []
    for norms in _batches(_norms(groups)):
        of_batch = _sums_by_group(norms)
        indices += of_batch
        sums += of_batch.values()
    totals = [0.0] * len(groups)
    for index, value in zip(indices, torch.stack(sums).tolist()):
        totals[index] += value
    return totals


def _norms(groups: Sequence[Iterable[Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """The number of a group, and a tensor that has the norm of a part of it, over and over."""
    for index, tensors in enumerate(groups):
        for part in _joined_parts(tensors):
            for norms in _norms_of(part):
                yield index, _off_mps(norms)


def _norms_of(part: Tensor) -> Iterator[Tensor]:
    """Few elements in 1-d tensors, with the norm of all elements of a part: norms of rows, and of rows of these."""
    if part.dtype != torch.float32 and part.dtype not in HALF:
        yield _exact_sum_of_squares([part]).sqrt().view(1)
    elif part.numel() <= _FEW:
        yield part.view(-1).to(torch.float32)
    else:
        for norms in _norms_of_rows(part):
            if norms.numel() <= _FEW:
                yield norms
            else:
                yield from _norms_of_float32_rows(norms, _ROW_OF_NORMS, ROWS)


def _norms_of_rows(part: Tensor) -> Iterator[Tensor]:
    if part.dtype == torch.float32:
        return _norms_of_float32_rows(part, ROW, ROWS)
    if part.device.type == "cpu" and part.numel() > _WIDENED_ROWS * ROW:
        return _norms_of_half_rows(part)
    return _norms_of_float32_rows(part, ROW, _WIDENED_ROWS)


def _batches(norms: Iterable[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    """So many that they are worth a call and take little memory."""
    batch: list[tuple[int, Tensor]] = []
    size = 0
    for index, of_part in norms:
        batch.append((index, of_part))
        size += of_part.numel()
        if size >= _MOST_NORMS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _sums_by_group(norms: Sequence[tuple[int, Tensor]]) -> dict[int, Tensor]:
    """The sum of squares of each group, of norms that come group after group."""
    sizes: dict[int, int] = {}
    for index, of_part in norms:
        sizes[index] = sizes.get(index, 0) + of_part.numel()
    squares = torch.cat([of_part for _, of_part in norms]).square_().to(torch.float64)
    return dict(zip(sizes, map(torch.sum, torch.split(squares, list(sizes.values())))))


def _norms_of_float32_rows(part: Tensor, longest: int, at_once: int) -> Iterator[Tensor]:
    """Of rows, and of the single elements that are left over."""
    size = part.numel()
    length = row_length(size, longest)
    count = size // length
    rows = part.as_strided((count, length), (length, 1))
    for some in [rows] if count <= at_once else torch.split(rows, at_once):
        yield torch.linalg.vector_norm(some, 2, 1, dtype=torch.float32)
    if count * length < size:
        # A view would keep what was copied alive.
        yield part.view(-1)[count * length :].to(torch.float32, copy=True)


def _norms_of_half_rows(part: Tensor) -> Iterator[Tensor]:
    """On a CPU, for half types, of which all norms of torch (2.13) make a float32 copy, or round the result.

    The moments of batch norm are taken without: ‖x‖² = n·(mean² + variance).
    """
    flat = part.view(-1)
    length = row_length(flat.numel(), _HALF_ROW)
    in_rows = flat.numel() // length * length
    for some in torch.split(flat[:in_rows], ROWS * length):
        # Not used, but its type is that of the moments.
        running = torch.zeros(some.numel() // length, dtype=torch.float32, device=some.device)
        mean, variance = torch.batch_norm_update_stats(some.view(1, -1, length), running, running, 0.0)
        yield torch.addcmul(variance, mean, mean).mul_(length).sqrt_()
    if in_rows < flat.numel():
        yield flat[in_rows:].to(torch.float32)


@functools.lru_cache(maxsize=4096)
def row_length(size: int, longest: int) -> int:
    """The length of rows that leaves nothing over, if one of whole cache lines does, as a call more has its price."""
    return next((length for length in range(longest, longest // 2, -16) if size % length == 0), longest)


def _exact_sum_of_squares(tensors: Iterable[Tensor]) -> Tensor:
    """In float64 throughout, for what float32 cannot hold."""
    parts = (part.view(-1) for tensor in tensors for part in _contiguous_parts(tensor))
    return torch.stack([_dot(piece) for part in parts for piece in torch.split(part, _WIDENED_PIECE)]).sum()


def _dot(vector: Tensor) -> Tensor:
    wide = _off_mps(vector).to(torch.float64)
    return torch.dot(wide, wide)


def _off_mps(tensor: Tensor) -> Tensor:
    """Apple's MPS has no float64."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def _joined_parts(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The elements of tensors as contiguous views, in any order, small tensors of one type copied together."""
    small: dict[torch.dtype, list[Tensor]] = {}
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        for part in _contiguous_parts(tensor):
            size, dtype = part.numel(), part.dtype
            if size > _SMALL:
                yield part
                continue
            small.setdefault(dtype, []).append(part if part.ndim == 1 else part.view(-1))
            sizes[dtype] = sizes.get(dtype, 0) + size
            if sizes[dtype] > _JOINED:
                yield torch.cat(small.pop(dtype))
                del sizes[dtype]
    for parts in small.values():
        yield torch.cat(parts) if len(parts) > 1 else parts[0]


def _contiguous_parts(tensor: Tensor) -> Iterable[Tensor]:
    """The elements of a tensor as contiguous views, in any order, or as small copies where it has gaps in memory."""
    tensor = _in_memory_order(tensor)
    return [tensor] if tensor.is_contiguous() else _copied_parts(tensor)


def _copied_parts(tensor: Tensor) -> Iterator[Tensor]:
    if tensor[0].numel() > _COPIED_PIECE:
        for row in tensor:
            yield from _contiguous_parts(row)
    else:
        for rows in torch.split(tensor, _COPIED_PIECE // max(tensor[0].numel(), 1)):
            yield rows.contiguous()


def _in_memory_order(tensor: Tensor) -> Tensor:
    """A real view that is contiguous unless the tensor has gaps in memory; a norm asks for no order."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.is_contiguous():
        return tensor
    return tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))  # channels_last and such
