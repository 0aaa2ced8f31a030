"""What was set in a param group since it was last looked at."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor

Group = dict[str, Any]
Changes = tuple[list[str], list[str]]

NOTHING: Changes = ([], [])


class Seen:
    """The values of a param group at one moment. Its members are not looked at."""

    __slots__ = ("_versions", "values")

    def __init__(self, group: Group) -> None:
        self.values = {key: _as_it_is(key, value) for key, value in group.items()}
        self._versions = {key: version_of([value]) for key, value in group.items() if isinstance(value, Tensor)}

    def note(self, group: Group, key: str) -> None:
        """Take the value of one key as seen."""
        self.values[key] = _as_it_is(key, group[key])
        if isinstance(group[key], Tensor):
            self._versions[key] = version_of([group[key]])

    def changes(self, group: Group) -> Changes:
        """The keys that were set since, and those that are gone, in their order.

        A tensor, a list, a dictionary that was filled in place was set.
        """
        before = self.values
        if not self._versions and _are_equal(group, before):
            return NOTHING
        changed = [key for key, value in group.items() if key != "params" and self._is_new(key, value)]
        gone = [key for key in before if key not in group]
        return (changed, gone) if changed or gone else NOTHING

    def _is_new(self, key: str, value: Any) -> bool:
        if key not in self.values:
            return True
        if key in self._versions:
            return value is not self.values[key] or version_of([value]) != self._versions[key]
        return value is not self.values[key] and not (is_mutable(value) and _are_equal(value, self.values[key]))


def is_mutable(value: Any) -> bool:
    """Whether an optimizer may count something in a value in place, tensors aside."""
    return isinstance(value, (list, dict, set, bytearray)) or (hasattr(value, "__array__") and hasattr(value, "dtype"))


def copied(value: Any) -> Any:
    """A value that stays as it is, whatever is counted in the first one; tensors inside are the same ones."""
    if isinstance(value, Tensor) or not is_mutable(value):
        return value
    if type(value) is list:
        return [copied(entry) for entry in value]
    if type(value) is dict:
        return {key: copied(entry) for key, entry in value.items()}
    return copy.copy(value)


def _as_it_is(key: str, value: Any) -> Any:
    return value if key == "params" else copied(value)


def _are_equal(a: Any, b: Any) -> bool:
    try:
        same = a == b  # a value is equal to itself without being asked, so this is fast
        return bool(same.all() if hasattr(same, "all") else same)
    except Exception:  # of arrays, whose comparison is no truth
        return False


def version_of(tensors: Iterable[Tensor]) -> int:
    """A number that changes when one of some tensors is filled in place; of inference tensors nothing is known."""
    return sum(0 if tensor.is_inference() else tensor._version for tensor in tensors)
