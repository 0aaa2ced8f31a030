"""Which part of a tensor a rule takes, as users write it: rows, or blocks along a dimension. Knows no model."""

from __future__ import annotations

import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from lightning_regdecay.rules.names import hint, safe_name
from lightning_regdecay.rules.scalars import is_array, whole_number

PADDING = "padding"
"""As ``rows``, the row that an ``nn.Embedding`` has for padding."""
_SLICE = re.compile(r"\s*(-?\d+)?\s*(?:(:)\s*(-?\d+)?\s*(?::\s*(-?\d+)?\s*)?)?")


class ByBlock(dict[str, Any]):
    """A value for each block, by its name. Not to be changed, so that rules can be hashed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))


Rows: TypeAlias = str | tuple[int, ...] | Callable[..., Any]
Blocks: TypeAlias = int | tuple[str, ...] | ByBlock


def rows_from(value: Any) -> Rows | None:
    """Rows as users give them.

    Raises:
        TypeError: for what is no slice as text, list of numbers or function.
        ValueError: for an empty list, and text that is no slice.
    """
    if value is None or callable(value):
        return value  # type: ignore[no-any-return]
    if isinstance(value, slice):
        value = ":".join("" if part is None else str(part) for part in (value.start, value.stop, value.step))
        value = value.removesuffix(":") if value.count(":") == 2 else value
    if isinstance(value, str) and value.startswith("<"):
        raise TypeError(
            f"rows was a function, of which YAML and checkpoints keep only the name {value!r}; pass it again in code"
        )
    if isinstance(value, str):
        text = str(value).strip().removesuffix(",")
        if text != PADDING and not all(is_slice(part) for part in text.split(",")):
            raise ValueError(
                f"rows must be a slice as text, such as '32000:' or '0:4, 100:', a list of numbers, {PADDING!r} or a "
                f"function rows(name, shape) that gives a mask, got {value!r}"
            )
        return text
    if is_array(value):
        value = value.tolist()
    if not isinstance(value, Iterable) or isinstance(value, Mapping):
        one = f"; write [{value!r}] for one row" if isinstance(value, numbers.Integral) else ""
        raise TypeError(
            f"rows must be a slice as text, a list of numbers or a function, got {value!r}{one}; a slice stands in "
            "quotes, as YAML takes 10:20 without them for the number 620, and 32000: for a mapping"
        )
    entries = tuple(value)
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, numbers.Integral):
            raise TypeError(f"rows must hold whole numbers, got {entry!r}; a mask is given by a function(name, shape)")
    if not entries:
        raise ValueError("rows is an empty list, which takes nothing; leave it out to take whole tensors")
    return tuple(int(entry) for entry in entries)


def is_slice(text: str) -> bool:
    """Whether a text is one number, or a slice."""
    parts = text.split(":")
    return text.strip() not in ("", "-") and _SLICE.fullmatch(text) is not None and parts[2:] != ["0"]


def slice_from(text: str) -> slice | int:
    """A slice, or a number, from its text.

    >>> slice_from("32000:"), slice_from("7"), slice_from("::2")
    (slice(32000, None, None), 7, slice(None, None, 2))
    """
    if ":" not in text:
        return int(text)
    parts = [int(part) if part.strip() else None for part in text.split(":")]
    return slice(*parts)


def blocks_from(value: Any) -> Blocks | None:
    """Blocks as users give them: their sizes by name, names of equal ones, or a number of these.

    Raises:
        TypeError: for what is none of these.
        ValueError: for sizes below 1, fewer than two blocks of one size, and names that come twice.
    """
    if value is None:
        return None
    if isinstance(value, Mapping):
        if not value:
            raise ValueError("blocks is empty; give each block a size, as in {'q': 768, 'k': 768, 'v': 768}")
        for name in value:
            _block_name(name)
        return ByBlock({str(name): whole_number(f"block {name!r}", size, least=1) for name, size in value.items()})
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        names = tuple(_block_name(name) for name in value)
        if len(set(names)) != len(names) or len(names) < 2:
            raise ValueError(f"blocks must be two names or more, each once, got {list(value)!r}")
        return names
    if isinstance(value, (str, bytes)) and not str(value).strip().isdigit():
        raise TypeError(f"blocks must be sizes by name, a list of names, or a number of equal ones, got {value!r}")
    return whole_number("blocks", value, least=2)


def _block_name(name: Any) -> str:
    if isinstance(name, bool) or not isinstance(name, (str, int)) or not str(name):
        raise TypeError(f"the name of a block must be text, got {name!r}")
    return safe_name(str(name))


def names_of(blocks: Blocks) -> tuple[str, ...]:
    """The names of blocks, in their order.

    >>> names_of(3), names_of(("q", "k", "v"))
    (('0', '1', '2'), ('q', 'k', 'v'))
    """
    return tuple(map(str, range(blocks))) if isinstance(blocks, int) else tuple(blocks)


def block_from(value: Any, blocks: Blocks | None) -> str | None:
    """The block that a rule takes, of those that it has.

    Raises:
        TypeError: where there are no blocks.
        ValueError: for one that is not among them.
    """
    if value is None:
        return None
    if blocks is None:
        raise TypeError(f"block={value!r} needs blocks, which say what the tensor is made of, as in blocks=['q', 'k']")
    name = _block_name(value)
    if name not in names_of(blocks):
        raise ValueError(f"unknown block {value!r}; {hint(name, names_of(blocks))}")
    return name


def region_text(rows: Rows | None, blocks: Blocks | None, block: str | None, dim: int | None) -> str:
    """What a rule takes of a tensor, in a few words; empty for all of it."""
    along = "" if dim in (None, 0) else f" of dim {dim}"
    if blocks is not None:
        every = ",".join(names_of(blocks))
        return f"block {block} of {every}{along}" if block is not None else f"blocks {every}{along}"
    if rows is None:
        return ""
    if callable(rows):
        return f"rows by {getattr(rows, '__qualname__', type(rows).__qualname__)}{along}"
    text = rows if isinstance(rows, str) else ",".join(map(str, rows))
    return f"rows {text if len(text) <= 24 else text[:23] + '…'}{along}"
