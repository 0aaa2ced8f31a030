"""What is measured while an optimizer steps: gradients as it sees them, and what it does to the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_regdecay.figures.norms import LocalSums, Part, is_measurable, local_sums
from lightning_regdecay.groups.shards import local_part

GRADIENT, BEFORE, UPDATE = "gradient", "before", "update"
_HALF = (torch.float16, torch.bfloat16)


class StepWatcher:
    """Looks on at the steps that are to be logged: the sums of squares of gradients, weights before, and updates.

    Memory: where updates are asked for, one copy of the parameters of the optimizer, as float32 for half types, from
    before the step until it is done; else none.

    Args:
        groups_of: tells the param groups of an optimizer as it steps over them, by their names.
        gradients: whether gradients are asked for.
        updates: whether updates are.
    """

    def __init__(
        self, groups_of: Callable[[Any], Mapping[str, Mapping[str, Any]]], *, gradients: bool, updates: bool
    ) -> None:
        self.is_due = False
        """Whether the steps of this batch are to be looked at."""
        self._groups_of, self._gradients, self._updates = groups_of, gradients, updates
        self.decay: dict[str, float] = {}
        """lr·λ of the last step of each group."""
        self._sums: dict[tuple[str, str], LocalSums] = {}
        self._held: dict[str, list[tuple[Tensor, Part]]] = {}

    def start_batch(self, is_due: bool) -> None:
        """Forget what was seen."""
        self.is_due = is_due
        self._sums, self._held, self.decay = {}, {}, {}

    def take(self) -> dict[tuple[str, str], LocalSums]:
        """The sums of the last step of each group since the batch began, by group and kind."""
        sums, self._sums = self._sums, {}
        return sums

    @torch.no_grad()
    def before(self, optimizer: Any) -> None:
        """The gradients are there."""
        self._held = {}
        if not self.is_due:
            return
        scale = getattr(optimizer, "grad_scale", None)  # of GradScaler, where a fused optimizer divides by it
        gradients: dict[str, list[Part]] = {}
        weights: dict[str, list[Part]] = {}
        for name, group in self._groups_of(optimizer).items():
            gradients[name], weights[name], self._held[name] = [], [], []
            self.decay[name] = float(group.get("lr") or 0.0) * float(group.get("weight_decay") or 0.0)
            for tensor in group["params"]:
                part, shards = local_part(tensor)
                if tensor.grad is not None and is_measurable(tensor.grad):
                    gradients[name].append(Part(_local(tensor.grad), shards))
                if self._updates and part.layout == torch.strided:
                    kept = part.to(torch.float32) if part.dtype in _HALF else part.clone()
                    weights[name].append(Part(kept, shards))
                    self._held[name].append((tensor, weights[name][-1]))
        if self._gradients:
            by_scale = 1.0 if scale is None else float(scale) ** -2
            for name, sums in local_sums(gradients).items():
                scaled = LocalSums(by_scale * sums.whole, by_scale * sums.sharded, sums.device)
                self._sums[name, GRADIENT] = scaled
        if self._updates:
            self._sums.update({(name, BEFORE): sums for name, sums in local_sums(weights).items()})

    @torch.no_grad()
    def after(self, optimizer: Any) -> None:
        """The step is done."""
        held, self._held = self._held, {}
        if not held or not self._updates:
            return
        updates = {
            name: [Part(kept.values.sub_(local_part(tensor)[0]), kept.shards) for tensor, kept in members]
            for name, members in held.items()
        }
        self._sums.update({(name, UPDATE): sums for name, sums in local_sums(updates).items()})


def _local(gradient: Any) -> Tensor:
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient  # type: ignore[no-any-return]
