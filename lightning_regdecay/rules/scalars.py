"""Numbers as users give them, in configuration files too: checked, with messages that name what they are."""

from __future__ import annotations

import math
import numbers
from decimal import Decimal
from typing import Any


def nonnegative_number(name: str, value: Any) -> float | None:
    """A coefficient from a number or its text; None where it is not given."""
    number = _number(name, value)
    if number is not None and not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    return number


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, Decimal, str)):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    number = number_of(value)
    if number is None:
        raise ValueError(f"{name} must be a number, got the text {value!r}")
    return number


def number_of(value: Any) -> float | None:
    """A number from a number or its text, None where the text is none."""
    try:
        return float(value)
    except ValueError:
        return None
    except OverflowError:
        return math.inf


def positive_number(name: str, value: Any) -> float | None:
    """As :func:`nonnegative_number`, but not 0."""
    number = _number(name, value)
    if number is not None and not (math.isfinite(number) and number > 0):
        kind = "above 0" if math.isfinite(number) else "a finite number"
        raise ValueError(f"{name} must be {kind}, got {value!r}")
    return number


def whole_number(name: str, value: Any, least: int) -> int | None:
    """A count from a number or its text; None where it is not given."""
    number = nonnegative_number(name, value)
    if number is None:
        return None
    if number != int(number) or number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return int(number)
