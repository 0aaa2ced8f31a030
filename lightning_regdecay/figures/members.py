"""What is measured of a group: whole tensors, or parts of them, and how far they are from a start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_regdecay.figures.changes import changes
from lightning_regdecay.figures.norms import LocalSums, Part, local_sums
from lightning_regdecay.groups.regions import Region, held_parts


class Member(NamedTuple):
    """A tensor of a group.

    Args:
        tensor: the tensor.
        region: the part of it that is in the group, None for all of it.
        start: what this process holds of the weights that it decays toward, None where these are not known yet.
    """

    tensor: Tensor
    region: Region | None = None
    start: Tensor | None = None

    def held(self, values: Tensor | None = None) -> list[Part]:
        """What this process holds of it, or of values that are cut as the tensor is."""
        return [Part(*held) for held in held_parts(self.tensor, self.region, values)]


def distances(groups: Mapping[str, Iterable[Member]]) -> dict[str, LocalSums]:
    """The sums of squares of what is between the members of groups and their starts; of no start yet, 0.

    Memory: pieces of the difference, and where starts are kept on another device one tensor at a time.
    """
    now: dict[Tensor, Tensor] = {}
    starts: dict[str, list[Part]] = {name: [] for name in groups}
    for name, members in groups.items():
        for member in members:
            for number, own in enumerate(member.held()):
                if member.start is None:
                    start = own.values.new_empty(0)
                    now[start] = start
                else:
                    start = member.held(member.start.to(own.values.device))[number].values
                    now[start] = own.values
                starts[name].append(Part(start, own.shards))
    with torch.no_grad():
        return local_sums(starts, pieces=changes(now.__getitem__))
