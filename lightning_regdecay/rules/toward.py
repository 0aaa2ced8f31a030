"""What a rule decays weights toward, as users write it. Knows no model and no optimizer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeAlias

START = "start"
"""The weights as they are when training begins."""
DTYPES = ("float32", "bfloat16", "float16", "float64")


class GivenStart:
    """Weights that a user has given, by the names of parameters; equal to another of the same tensors."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.tensors = dict(tensors)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GivenStart):
            return NotImplemented
        mine, others = self.tensors, other.tensors
        return mine.keys() == others.keys() and all(mine[name] is others[name] for name in mine)

    def __hash__(self) -> int:
        return hash(frozenset(self.tensors))

    def __repr__(self) -> str:
        return f"<state dict of {len(self.tensors)} tensors>"


Toward: TypeAlias = str | GivenStart


def toward_from(value: Any) -> Toward | None:
    """What a rule decays toward: ``"start"``, the path of a file, or weights by name.

    Raises:
        TypeError: for what is none of these.
        ValueError: for an empty state dict.
    """
    if value is None or isinstance(value, GivenStart):
        return value
    if isinstance(value, str) and value.startswith("<state dict"):
        raise TypeError(
            f"toward was a state dict, of which YAML and checkpoints keep only {value!r}; pass it again in code, or "
            "give the path of a file"
        )
    if isinstance(value, (str, os.PathLike)) and os.fspath(value):
        return str(os.fspath(value))
    if not isinstance(value, Mapping):
        raise TypeError(f"toward must be {START!r}, the path of a file or a state dict, got {value!r}")
    if not value:
        raise ValueError("toward is an empty state dict; give the weights by the names of the parameters")
    for name, tensor in value.items():
        if not isinstance(name, str):
            raise TypeError(f"toward must map names of parameters to tensors, got the key {name!r}")
        if not hasattr(tensor, "shape") or not hasattr(tensor, "dtype"):
            raise TypeError(f"toward must map names of parameters to tensors, got {tensor!r} for {name!r}")
    return GivenStart(value)


def dtype_from(value: Any) -> str | None:
    """The type in which a start is kept, by its name; None for that of the parameter.

    Raises:
        ValueError: for another.
    """
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"toward_dtype must be one of {', '.join(DTYPES)}, got {value!r}")
    return name


def device_from(value: Any) -> str | None:
    """Where a start is kept: ``"cpu"``, or None for beside the parameter.

    Raises:
        ValueError: for anything else.
    """
    if value is None or str(value) == "cpu":
        return None if value is None else "cpu"
    raise ValueError(f"toward_device must be 'cpu', or left out to keep the start beside its parameter, got {value!r}")
