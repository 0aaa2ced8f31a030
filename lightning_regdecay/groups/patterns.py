"""Names of a model with their numbers put together: a deep model takes a line per kind of layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def name_patterns(names: Iterable[str]) -> list[str]:
    """Names with their numbers put together, so that a deep model takes a line per kind of parameter.

    >>> name_patterns(["layers.0.bias", "layers.1.bias", "layers.3.bias", "head.bias"])
    ['layers.[0-1,3].bias  (3)', 'head.bias']
    """
    alike: dict[str, list[list[int]]] = {}
    for name in names:
        template, numbers = split(name)
        alike.setdefault(template, []).append(numbers)
    return [
        put_together(template, numbers) + f"  ({len(numbers):,})" * (len(numbers) > 1)
        for template, numbers in alike.items()
    ]


def split(name: str) -> tuple[str, list[int]]:
    """A name as a template with places for its numbers, and these.

    >>> split("layers.3.mlp.0.bias")
    ('layers.{}.mlp.{}.bias', [3, 0])
    """
    parts = name.split(".")
    template = ".".join("{}" if part.isdecimal() else re.sub(r"([{}])", r"\1\1", part) for part in parts)
    return template, [int(part) for part in parts if part.isdecimal()]


def put_together(template: str, numbers: Iterable[Sequence[int]]) -> str:
    """The names of one template as one.

    >>> put_together("layers.{}.mlp.{}.bias", [[0, 1], [1, 1], [3, 1]])
    'layers.[0-1,3].mlp.1.bias'
    """
    return template.format(*map(_ranges, zip(*numbers)))


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers as ranges, in brackets where there are several.

    >>> _ranges([0, 1, 2, 5]), _ranges([3, 3])
    ('[0-2,5]', '3')
    """
    known = set(numbers)
    found = sorted(known)
    if len(found) == 1:
        return str(found[0])
    starts = [n for n in found if n - 1 not in known]
    ends = [n for n in found if n + 1 not in known]
    return f"[{','.join(str(a) if a == b else f'{a}-{b}' for a, b in zip(starts, ends))}]"
