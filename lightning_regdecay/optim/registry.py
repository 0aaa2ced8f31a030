"""What is known of each optimizer, kept for as long as that lives."""

from __future__ import annotations

import threading
import weakref
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Values for objects, which are not kept alive, and need not be hashable. May be used from several threads."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Any], T]] = {}
        self._lock = threading.RLock()  # garbage may be collected while it is held

    def get(self, key: Any) -> T | None:
        """The value for an object."""
        reference, value = self._entries.get(id(key), (None, None))
        return value if reference is not None and reference() is key else None

    def set(self, key: Any, value: T) -> None:
        """Set the value for an object."""
        number = id(key)

        def forget(reference: weakref.ref[Any]) -> None:
            with self._lock:
                if self._entries.get(number, (None,))[0] is reference:
                    del self._entries[number]

        with self._lock:
            self._entries[number] = (weakref.ref(key, forget), value)

    def pop(self, key: Any) -> T | None:
        """Take the value for an object away."""
        with self._lock:
            value = self.get(key)
            self._entries.pop(id(key), None)
            return value

    def values(self) -> list[T]:
        """All values, each once."""
        with self._lock:
            entries = self._entries.copy()
        return list({id(value): value for _, value in entries.values()}.values())
