"""Whether parameters are stepped past the rules that should be in force for them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_regdecay.groups.places import Places
from lightning_regdecay.optim.seen import version_of
from lightning_regdecay.optim.step_room import StepRoom

_MOST_MISSES = 2
"""Steps past a room that was stepped through before: between two of its steps, weights may be clipped or averaged."""


class Witness:
    """Watches the parameters of a room: they change in steps of the room, or somebody passes the rules by.

    Args:
        room: the optimizers, at the start of a run.
    """

    def __init__(self, room: StepRoom) -> None:
        self.room = room
        self._first = self._steps = room.steps_done
        self._start = self._version()
        self._last: int | None = self._start
        self._misses = 0
        self._is_alone = False

    @property
    def has_stepped(self) -> bool:
        """Whether a step of the run went through the room."""
        return self.room.steps_done != self._first

    def begin_batch(self, is_alone: bool) -> None:
        """Note how the parameters are before a batch.

        Args:
            is_alone: whether the steps that the run counts can only be of this room. What changes the parameters in a
                batch is then a step: averages are put in place, and weights clipped, between batches.
        """
        self._is_alone = is_alone
        if is_alone:
            self._last = self._version()

    def is_passed_by(self, is_step: bool) -> bool:
        """Whether steps are made past the room; to be asked after each batch.

        Args:
            is_step: whether the run counts a step in this batch. That alone is no proof: it may have been skipped.
        """
        if self.room.steps_done != self._steps:
            self._steps = self.room.steps_done
            if not self._is_alone:
                self._last, self._misses = None, 0
            return False
        before, self._last = self._last, self._version()
        if is_step and before is not None and self._last != before:
            self._misses += 1
        return self._misses >= (_MOST_MISSES if self.has_stepped else 1) and self._changes()

    def was_passed_by(self) -> bool:
        """Whether the parameters have changed without any step, at the end of a run."""
        return not self.has_stepped and self._version() != self._start and self._changes()

    def _changes(self) -> bool:
        return self.room.parting.changes(self.room.groups)

    def _version(self) -> int:
        """A number that changes with the parameters."""
        return version_of(parameter for group in self.room.groups for parameter in group["params"])


class StrayWitness:
    """Watches what rules have a λ for and no optimizer that is known has: an optimizer inside the model may train it.

    Args:
        module: the model.
        rooms: those that its rules are in force in.
        optimizers: all that are known.
    """

    def __init__(self, module: nn.Module, rooms: Iterable[StepRoom], optimizers: Iterable[Any]) -> None:
        held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        loose = {id(p) for p in module.parameters() if p.requires_grad} - held
        places = next((p for room in rooms if (p := _places_of(room, module)) is not None), None)
        # Most models have none, so that nobody has to look for the places of all parameters.
        found = places.find() if loose and places is not None else {}
        self._strays = [
            (weakref.ref(one.parameter), one.name) for key, one in found.items() if key in loose and one.place.is_ruled
        ]
        self._last = self._versions()

    def trained(self) -> str | None:
        """The name of a parameter that was trained since this was asked, None where none was.

        What changes without a gradient, as a moving average does, is not trained.
        """
        before, self._last = self._last, self._versions()
        for reference, name in self._strays:
            parameter = reference()
            if parameter is not None and parameter.grad is not None and self._last[name] != before[name]:
                return name
        return None

    def _versions(self) -> dict[str, int]:
        params = [(name, reference()) for reference, name in self._strays]
        return {name: 0 if parameter is None else version_of([parameter]) for name, parameter in params}


def _places_of(room: StepRoom, module: nn.Module) -> Places | None:
    return next((layer.places for layer in room.parting.layers if layer.places.module() is module), None)
