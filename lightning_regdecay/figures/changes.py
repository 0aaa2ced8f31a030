"""The norm of what a step has changed: two reads, nothing written, and no memory but for a piece of the change."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightning_regdecay.figures.norms import GPU_PIECE, HALF, ROW, ROWS, Pieces, row_length

_PIECE = 2**16
"""Elements that are subtracted per call: 0.5 MiB at most, of which two are there at a time."""
_SMALL = 2**13
"""Elements up to which a difference is taken whole, and measured together with others."""


def changes(now_of: Callable[[Tensor], Tensor]) -> Pieces:
    """What to measure in the place of tensors, to have the norm of what has changed in them.

    Args:
        now_of: tells what a tensor is now, of the same shape, type and device.
    """
    return Pieces(
        fast=lambda before: _norms(now_of(before), before), exact=lambda before: _differences(now_of(before), before)
    )


def _norms(now: Tensor, before: Tensor) -> Iterator[Tensor]:
    """Norms of parts of the change, or parts themselves."""
    if now.device.type == "cuda":
        yield from _norms_of_pieces(now, before)
        return
    if now.device.type == "cpu" and now.dtype == before.dtype == torch.float32 and now.numel() > _SMALL:
        ordered = _in_order_of_memory(now, before)
        if all(tensor.is_contiguous() for tensor in ordered):
            yield from _norms_of_rows(*ordered)
            return
    yield from _differences(now, before)


def _norms_of_pieces(now: Tensor, before: Tensor) -> Iterator[Tensor]:
    """For a GPU, where one call for the pieces of all tensors would hold them all at once."""
    for piece in _differences(now, before):
        norm: Tensor = torch.linalg.vector_norm(piece)
        yield norm.view(1)


def _norms_of_rows(now: Tensor, before: Tensor) -> Iterator[Tensor]:
    """Of contiguous tensors of float32: the distances of rows, for which torch puts no difference into memory.

    One by one: of more than 25 at once it would take products, which lose a small distance of large rows.
    """
    size = now.numel()
    length = row_length(size, ROW)
    count = size // length
    rows = [tensor.as_strided((count, 1, length), (length, length, 1)) for tensor in (now, before)]
    for some, of_before in zip(*(torch.split(tensor, ROWS) for tensor in rows)):
        yield torch.cdist(some, of_before).to(torch.float64)
    if count * length < size:
        yield now.view(-1)[count * length :] - before.view(-1)[count * length :]


def _differences(now: Tensor, before: Tensor) -> Iterator[Tensor]:
    """The change, piece by piece; of half types as float32, as they would round it."""
    size = GPU_PIECE if now.device.type == "cuda" else _PIECE
    if now.numel() <= size:
        yield now.to(torch.float32).sub_(before) if now.dtype in HALF else now - before
        return
    now, before = _in_order_of_memory(now, before)
    rows = size // before[0].numel()
    for some, of_before in zip(torch.split(now, max(rows, 1)), torch.split(before, max(rows, 1))):
        yield from _differences(some, of_before) if rows else _differences(some[0], of_before[0])


def _in_order_of_memory(now: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    order = sorted(range(before.ndim), key=before.stride, reverse=True)
    return now.permute(order), before.permute(order)
