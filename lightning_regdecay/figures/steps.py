"""What is measured while an optimizer steps: gradients as it sees them, and what it does to the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_regdecay.figures.changes import changes
from lightning_regdecay.figures.members import Member, distances
from lightning_regdecay.figures.norms import LocalSums, Part, is_measurable, local_sums

GRADIENT, BEFORE, UPDATE, AWAY = "gradient", "before", "update", "away"


class Stepped(NamedTuple):
    """A group as it is stepped over.

    Args:
        members: its tensors.
        rate: lr·λ.
        has_start: whether it decays toward a start.
    """

    members: list[Member]
    rate: float
    has_start: bool


class StepWatcher:
    """Looks on at the steps that are to be logged: the sums of squares of gradients, weights before, and updates.

    Memory: where updates are asked for, one copy of the parameters of the optimizer, in their own types, from before
    the step until its update is measured, and pieces of the update (1 MiB, on a GPU 64 MiB); else none.

    Args:
        groups_of: tells the groups of an optimizer as it steps over them, by their names.
        gradients: whether gradients are asked for.
        updates: whether updates are.
        is_over: tells whether the fit is over.
    """

    def __init__(
        self,
        groups_of: Callable[[Any], Mapping[str, Stepped]],
        *,
        gradients: bool,
        updates: bool,
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        self.is_due = False
        """Whether the steps of this batch are to be looked at."""
        self._groups_of, self._gradients, self._updates = groups_of, gradients, updates
        self._is_over = is_over
        self.decay: dict[str, float] = {}
        """lr·λ of the last step of each group."""
        self._sums: dict[tuple[str, str], LocalSums] = {}
        self._held: dict[str, list[tuple[Member, list[Part]]]] = {}

    def start_batch(self, is_due: bool, forget: bool) -> None:
        """Look on at the steps of a batch, or not.

        Args:
            is_due: whether they are to be logged.
            forget: what was seen of steps before.
        """
        self.is_due, self._held = is_due, {}
        if forget:
            self._sums, self.decay = {}, {}

    @property
    def sums(self) -> dict[tuple[str, str], LocalSums]:
        """Of the last step of each group that was looked at, by group and kind."""
        return dict(self._sums)

    @torch.no_grad()
    def begin(self, optimizer: Any) -> None:
        """The step of an optimizer around others begins."""
        if self.is_due and self._updates and not self._is_over():
            self._keep(self._groups_of(optimizer))

    @torch.no_grad()
    def before(self, optimizer: Any) -> None:
        """The gradients are there."""
        if not self.is_due or self._is_over():
            self._held = {}
            return
        groups = self._groups_of(optimizer)
        scale = getattr(optimizer, "grad_scale", None)  # of GradScaler, where a fused optimizer divides by it
        by_scale = 1.0 if scale is None else float(scale) ** -2 if float(scale) else None
        gradients: dict[str, list[Part]] = {}
        for name, group in groups.items():
            self.decay[name] = group.rate
            gradients[name] = [
                part
                for member in group.members
                if member.tensor.grad is not None and is_measurable(member.tensor.grad)
                for part in member.held(_local(member.tensor.grad))
            ]
        if self._gradients and by_scale is not None:
            for name, sums in local_sums(gradients).items():
                scaled = LocalSums(by_scale * sums.whole, by_scale * sums.sharded, sums.device)
                self._sums[name, GRADIENT] = scaled
        if self._updates and not self._held:
            self._keep(groups)

    def _keep(self, groups: Mapping[str, Stepped]) -> None:
        """Keep the weights before the step, and measure them."""
        self._held = {}
        for name, group in groups.items():
            parts = [(member, member.held()) for member in group.members]
            self._held[name] = [
                (member, [Part(part.values.clone(), part.shards) for part in held])
                for member, held in parts
                if all(part.values.layout == torch.strided for part in held)
            ]
        self._sums.update({(name, BEFORE): sums for name, sums in local_sums(_kept(self._held)).items()})
        away = distances({name: group.members for name, group in groups.items() if group.has_start})
        self._sums.update({(name, AWAY): sums for name, sums in away.items()})

    @torch.no_grad()
    def after(self, optimizer: Any) -> None:
        """The step is done."""
        held, self._held = self._held, {}
        if not held or not self._updates:
            return
        now = {
            kept.values: part.values
            for members in held.values()
            for member, parts in members
            for kept, part in zip(parts, member.held())
        }
        updates = local_sums(_kept(held), pieces=changes(now.__getitem__))
        self._sums.update({(name, UPDATE): sums for name, sums in updates.items()})


def _kept(held: Mapping[str, list[tuple[Member, list[Part]]]]) -> dict[str, list[Part]]:
    return {name: [kept for _, parts in members for kept in parts] for name, members in held.items()}


def _local(gradient: Any) -> Tensor:
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient  # type: ignore[no-any-return]
