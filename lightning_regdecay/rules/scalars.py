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
    value = plain_number(value.tolist() if is_array(value) else value)
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    number = number_of(value)
    if number is None:
        raise ValueError(f"{name} must be a number, got the text {value!r}")
    return number


def plain_number(value: Any) -> Any:
    """A number of any kind (NumPy's, ``Decimal``, ``Fraction``) as Python's own; everything else as it is."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, (numbers.Real, Decimal)):
        return float(value)
    if isinstance(value, numbers.Complex):
        return complex(value)
    return bool(value) if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_") else value


def is_array(value: Any) -> bool:
    """Whether something is an array of NumPy's."""
    return type(value).__module__ == "numpy" and type(value).__name__ == "ndarray"


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


def finite_number(name: str, value: Any) -> float | None:
    """A number of any sign from a number or its text; None where it is not given."""
    number = _number(name, value)
    if number is not None and not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return number


def whole_number(name: str, value: Any, least: int) -> int | None:
    """A count from a number or its text; None where it is not given."""
    number = _number(name, value)
    if number is None:
        return None
    if not (math.isfinite(number) and number == int(number) and number >= least):
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return int(number)


def true_or_false(name: str, value: Any, others: str = "") -> bool:
    """A switch, NumPy's too; text and numbers are none, as ``"False"`` would count as true.

    Args:
        name: what it is called.
        value: the switch.
        others: what else it might have been, for the message.
    """
    switch = plain_number(value)
    if not isinstance(switch, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}{f'; {others} will do too' if others else ''}")
    return switch
