"""What selects parameters, and what every kind of rule has beside. Knows no model."""

from __future__ import annotations

import fnmatch
import functools
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, cast

from lightning_regdecay.rules.names import REGEX_PREFIX, TOTAL, safe_name
from lightning_regdecay.rules.scalars import is_array, nonnegative_number, number_of, plain_number, true_or_false
from lightning_regdecay.rules.schedules import STRENGTH_KEYS

_SET_BY_THE_RULE = {"params", "param_names", "name", *STRENGTH_KEYS}
SELECTORS = {"params", "modules", "min_ndim", "max_ndim", "where"}
NAMED_TESTS = ("depthwise", "marked", "no_weight_decay", "no_weight_decay_keywords", "unexpected")
"""What ``where`` may be by name, so that text can hold it."""
RESERVED_GROUPS = {TOTAL}  # `<prefix>/total/penalty` is the sum over all groups


@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class Rule:
    """Which parameters a rule is for, and what it sets beside its own quantity: see the rules of each kind.

    Raises:
        TypeError: for a value of the wrong kind.
        ValueError: for a bad pattern, or a value out of range.
    """

    KIND: ClassVar[str] = "rule"
    """What messages call it."""
    FIRST: ClassVar[tuple[str, ...]] = ()
    """The fields of its own quantity, which come first; the first of them stands alone in ``{pattern: value}``."""
    AGREED: ClassVar[tuple[str, ...]] = ("lr_mult", "options")
    """Other fields on which rules of one group must agree."""

    params: str | Sequence[str] = ()
    modules: str | type | Sequence[str | type] = ()
    min_ndim: int | None = None
    max_ndim: int | None = None
    where: Callable[..., bool] | str | None = None
    group: str | None = None
    lr_mult: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False

    def __post_init__(self) -> None:
        self._set(
            params=_selectors("params", self.params, (str,)),
            modules=_selectors("modules", self.modules, (str, type)),
            min_ndim=_ndim("min_ndim", self.min_ndim),
            max_ndim=_ndim("max_ndim", self.max_ndim),
            where=_predicate(self.where),
            group=_group(self.group),
            lr_mult=nonnegative_number("lr_mult", self.lr_mult),
            options=_options(self.options),
            optional=true_or_false("optional", self.optional),
        )
        if self.min_ndim is not None and self.max_ndim is not None and self.min_ndim > self.max_ndim:
            raise ValueError(f"min_ndim={self.min_ndim} is above max_ndim={self.max_ndim}: no parameter has both")
        if self.lr_mult is not None and "lr" in self.options:
            raise ValueError("lr_mult and the option lr say the same thing twice: give one of them")

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        names = [name for name in field_names(type(self)) if name != "options"]
        same = all(getattr(self, name) == getattr(other, name) for name in names)
        return same and equal_options(self.options, other.options)

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, name) for name in field_names(type(self)) if name != "options"))

    def __repr__(self) -> str:
        given = {name: shorter(value) for name, value in given_fields(self).items()}
        alone = self.FIRST[0]
        parts = [f"{name}={value!r}" for name, value in given.items() if name != alone]
        return f"{type(self).__name__}({', '.join([repr(getattr(self, alone))] * (alone in given) + parts)})"

    @property
    def is_partial(self) -> bool:
        """Whether it takes a part of each tensor."""
        return False

    def one_by_one(self) -> list[Any]:
        """A rule for each thing that it takes, itself where that is one only."""
        return [self]

    @property
    def part_text(self) -> str:
        """What it takes of each tensor, in a few words; empty for all of it."""
        return ""

    @property
    def selector_text(self) -> str:
        """The selectors in one line, and what is taken of each tensor, for tables and messages."""
        return f"{self.selectors_text} {self.part_text}".rstrip()

    @property
    def selectors_text(self) -> str:
        """The selectors in one line."""
        parts = [" | ".join(patterns_of(self))] if patterns_of(self) else []
        if classes_of(self):
            parts.append("modules=" + " | ".join(map(class_text, classes_of(self))))
        parts += [f"{name}={bound}" for name, bound in self._bounds()]
        if self.where is not None:
            parts.append(f"where={name_of_test(self.where)}")
        return " & ".join(parts) or "*"

    def _bounds(self) -> list[tuple[str, int]]:
        bounds = ("min_ndim", self.min_ndim), ("max_ndim", self.max_ndim)
        return [(name, bound) for name, bound in bounds if bound is not None]


def patterns_of(rule: Rule) -> tuple[str, ...]:
    """The entries of ``params``, which a user may give as one or as many."""
    return cast("tuple[str, ...]", rule.params)


def classes_of(rule: Rule) -> tuple[str | type, ...]:
    """The entries of ``modules``, which a user may give as one or as many."""
    return cast("tuple[str | type, ...]", rule.modules)


def given_fields(rule: Rule) -> dict[str, Any]:
    """The fields of a rule that were given, in order."""
    names = field_names(type(rule))
    values = {name: getattr(rule, name) for name in sorted(names, key=lambda name: name not in rule.FIRST)}
    return {name: value for name, value in values.items() if value not in (None, (), {}) and value is not False}


@functools.cache
def compile_pattern(pattern: str) -> Callable[[str], Any]:
    r"""A function that tells whether a name matches: a glob over the whole of it, or after ``re:`` a search.

    A name that is written in full matches itself, brackets and all.

    >>> bool(compile_pattern("*.bias")("body.0.bias")), bool(compile_pattern(r"re:\.[01]\.")("body.2.bias"))
    (True, False)
    """
    if not pattern.startswith(REGEX_PREFIX):
        glob = re.compile(fnmatch.translate(pattern)).match
        return glob if "[" not in pattern else lambda name: name == pattern or glob(name)
    try:
        return re.compile(pattern.removeprefix(REGEX_PREFIX)).search
    except re.error as error:
        raise ValueError(f"bad regular expression {pattern!r}: {error}") from None


def class_path(cls: type) -> str:
    """The full name of a class, such as ``torch.nn.modules.normalization.LayerNorm``."""
    return f"{cls.__module__}.{cls.__qualname__}"


def class_text(selector: str | type) -> str:
    """An entry of ``modules`` as text: a pattern as it is, a class by its name."""
    return selector if isinstance(selector, str) else selector.__name__


def field_names(kind: type[Any]) -> list[str]:
    """The names of all fields."""
    return [f.name for f in fields(kind)]


def _selectors(name: str, value: Any, kinds: tuple[type, ...]) -> tuple[Any, ...]:
    entries = (value,) if isinstance(value, kinds) else value
    if entries is None:
        return ()
    if not isinstance(entries, Iterable) or isinstance(entries, Mapping):
        raise TypeError(f"{name} must be a pattern or a list of patterns, got {value!r}")
    entries = tuple(entries)
    if not entries and value != ():
        raise ValueError(f"{name} is an empty list, which matches nothing; leave it out to select by other means")
    for entry in entries:
        if not isinstance(entry, kinds):
            raise TypeError(
                f"{name} must be {' or '.join(k.__name__ for k in kinds)}, or a list of them, got {entry!r}"
            )
        if entry in ("", REGEX_PREFIX):
            raise ValueError(f"{name} holds an empty pattern; write '*' for everything")
        if isinstance(entry, str):
            compile_pattern(entry)
    return entries


def _ndim(name: str, value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number of dimensions, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value!r}")
    return int(value)


def _predicate(value: Any) -> Callable[..., bool] | str | None:
    if isinstance(value, str) and value not in NAMED_TESTS:
        raise TypeError(
            f"where must be a function where(name, parameter, module), got the text {value!r}: YAML and checkpoints "
            "keep only the name of a predicate; pass the rules with the function again, in code; known by name are "
            f"{', '.join(NAMED_TESTS)}"
        )
    if value is not None and not isinstance(value, str) and not callable(value):
        raise TypeError(f"where must be a function where(name, parameter, module), got {value!r}")
    return value  # type: ignore[no-any-return]


def _group(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise TypeError(f"group must be a name (text), got {value!r}")
    name = safe_name(value)
    if name in RESERVED_GROUPS:
        raise ValueError(f"group {value!r} would clash with the logged total over all groups; choose another name")
    return name


def _options(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"options must be a mapping of the optimizer's options, such as {{'lr': 1e-4}}, got {value!r}")
    for name in value:
        if not isinstance(name, str):
            raise TypeError(f"options must have text as keys, got {name!r}")
        if name in _SET_BY_THE_RULE:
            raise ValueError(f"options may not hold {name!r}: the rule itself sets it")
    options = {name: _option(option) for name, option in value.items()}
    if isinstance(options.get("lr"), (int, float, str, tuple)):  # not a tensor, which torch takes too
        options["lr"] = nonnegative_number("lr", options["lr"])  # torch checks its defaults only
    return options


def _option(value: Any) -> Any:
    """An option as an optimizer takes it, and a checkpoint keeps it.

    Numbers of any kind, and those that came as text (YAML's ``1e-3``), are Python's own; lists and arrays are tuples.
    """
    if isinstance(value, str):
        number = number_of(value)
        return str(value) if number is None else number
    if is_array(value):
        return _option(value.tolist())
    if isinstance(value, Mapping):
        return {key: _option(entry) for key, entry in value.items()}
    if isinstance(value, Sequence):
        return tuple(_option(entry) for entry in value)
    return plain_number(value)


def equal_options(a: Any, b: Any) -> bool:
    """Whether two values of options are equal, tensors included."""
    if hasattr(a, "tolist") and hasattr(b, "tolist"):
        return type(a) is type(b) and bool(a.tolist() == b.tolist())
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(equal_options(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(equal_options, a, b))
    return not (hasattr(a, "tolist") or hasattr(b, "tolist")) and bool(a == b)


def name_of_test(where: Any) -> str:
    """A named test or a predicate as text."""
    return where if isinstance(where, str) else function_name(where)


def function_name(function: Any) -> str:
    """What a function, or an object that is called, goes by."""
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def shorter(value: Any) -> Any:
    """Selectors as a user would write them: one alone, several in a list."""
    if not isinstance(value, tuple):
        return value
    return value[0] if len(value) == 1 and not isinstance(value[0], int) else list(value)  # numbers of rows are a list
