"""Whether parameters are stepped past the rules that should be in force for them."""

from __future__ import annotations

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

    @property
    def has_stepped(self) -> bool:
        """Whether a step of the run went through the room."""
        return self.room.steps_done != self._first

    def is_passed_by(self, is_step: bool) -> bool:
        """Whether steps are made past the room; to be asked after each batch.

        Args:
            is_step: whether the run counts a step in this batch. That alone is no proof: it may have been skipped.
        """
        if self.room.steps_done != self._steps:
            self._steps, self._last, self._misses = self.room.steps_done, None, 0
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
        params = (parameter for group in self.room.groups for parameter in group["params"])
        return sum(0 if parameter.is_inference() else parameter._version for parameter in params)
