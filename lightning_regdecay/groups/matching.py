"""Whether a rule takes a parameter, and why not: rules × parameters, one pair at a time."""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import nn

from lightning_regdecay.groups.parameters import ModelParameter, class_of, plain_name
from lightning_regdecay.rules.names import REGEX_PREFIX, hint, literal_text
from lightning_regdecay.rules.selectors import Rule, class_path, class_text, classes_of, compile_pattern, patterns_of

_MOST_NAMES = 5000  # compared on the way to a hint, so that a typo in a huge model is answered at once
_MOST_COMPARED = 200  # as a whole, of those that resemble it in some parts

_Test: TypeAlias = Callable[[ModelParameter], Any]


class Matcher:
    """A rule made ready to be held against many parameters."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.conditions = list(_conditions(rule))

    def takes(self, parameter: ModelParameter) -> bool:
        """Whether all selectors of the rule hold, in one of the places that hold the parameter."""
        return any(all(c.holds(place) for c in self.conditions) for place in parameter.places)

    def mismatch(self, parameter: ModelParameter) -> str | None:
        """Why the rule does not take a parameter, None where it does."""
        if self.takes(parameter):
            return None
        failed = [next(c for c in self.conditions if not c.holds(place)) for place in parameter.places]
        reasons = [c.otherwise(place) for c, place in zip(failed, parameter.places)]
        return "; ".join(dict.fromkeys(reasons))


def first_takers(matchers: Sequence[Matcher], parameters: Iterable[ModelParameter]) -> list[int | None]:
    """The number of the first rule that takes each parameter, None where there is none.

    Layers and experts repeat: parameters of one family (their names differ in digits alone), one class of module and
    one number of dimensions are a kind, and most rules take a kind as a whole. So rules are held against kinds where
    they can be.
    """
    plans: dict[tuple[str, type, int], _Plan] = {}
    takers = []
    for parameter in parameters:
        if parameter.tied:
            takers.append(next((i for i, matcher in enumerate(matchers) if matcher.takes(parameter)), None))
            continue
        kind = parameter.family, class_of(parameter.module), parameter.ndim
        plan = plans.get(kind)
        if plan is None:
            plan = plans[kind] = _plan(matchers, parameter)
        for index, conditions in plan.open:
            if all(condition.holds(parameter) for condition in conditions):
                takers.append(index)
                break
        else:
            takers.append(plan.taker)
    return takers


class _Plan(NamedTuple):
    """What is known of the rules for all parameters of a kind."""

    open: list[tuple[int, list[_Condition]]]
    """Rules before the taker, with the conditions that are to be held against each parameter."""
    taker: int | None
    """The first rule that takes the whole kind."""


def _plan(matchers: Sequence[Matcher], parameter: ModelParameter) -> _Plan:
    """What is known for the kind that a parameter is of."""
    undecided: list[tuple[int, list[_Condition]]] = []
    for index, matcher in enumerate(matchers):
        if all(condition.holds(parameter) for condition in matcher.conditions if condition.by_kind):
            left = [condition for condition in matcher.conditions if not condition.by_kind]
            if not left:
                return _Plan(undecided, index)
            undecided.append((index, left))
    return _Plan(undecided, None)


class _Condition(NamedTuple):
    """One selector of a rule."""

    holds: _Test
    otherwise: Callable[[ModelParameter], str]
    """What to tell the user where it does not hold."""
    by_kind: bool = True
    """Whether it holds for all parameters of a kind or for none, see ``first_takers``."""


def _blind_to_digits(pattern: str) -> bool:
    r"""Whether a pattern that matches a name matches it with any other digits too.

    It does where it has no digit itself, as a class like ``[+-Z]`` has all ten digits or none. A regular expression
    may also name a digit (``\N{DIGIT ONE}``) or look for the same text twice (``(?P=name)``).
    """
    return not any(character.isdigit() for character in pattern) and "\\N" not in pattern and "(?P=" not in pattern


def _conditions(rule: Rule) -> Iterable[_Condition]:
    """The selectors of a rule as tests, the cheap ones first."""
    if patterns_of(rule):
        matches = [compile_pattern(pattern) for pattern in patterns_of(rule)]
        yield _Condition(
            lambda place: any(match(place.name) for match in matches),
            lambda place: f"its name does not match {listed(patterns_of(rule), ' or ')}",
            by_kind=all(map(_blind_to_digits, patterns_of(rule))),
        )
    if rule.min_ndim is not None:
        least = rule.min_ndim
        yield _Condition(
            lambda place: place.ndim >= least,
            lambda place: f"it has {place.ndim} dimensions, below min_ndim={least}",
        )
    if rule.max_ndim is not None:
        most = rule.max_ndim
        yield _Condition(
            lambda place: place.ndim <= most,
            lambda place: f"it has {place.ndim} dimensions, above max_ndim={most}",
        )
    if classes_of(rule):
        tests = [_class_test(selector) for selector in classes_of(rule)]
        wanted = listed(map(class_text, classes_of(rule)), " or ")
        yield _Condition(
            lambda place: any(test(class_of(place.module)) for test in tests),
            lambda place: f"its module is a {class_of(place.module).__name__}, not a {wanted}",
        )
    if rule.where is not None:
        test = _NAMED_TESTS[rule.where]() if isinstance(rule.where, str) else _predicate_test(rule.where)
        said = "where(...)" if callable(rule.where) else repr(rule.where)
        yield _Condition(
            lambda place: _where(rule, test, place),
            lambda place: f"{said} is false for it",
            by_kind=False,
        )


def _where(rule: Rule, test: _Test, place: ModelParameter) -> Any:
    if rule.where == "unexpected":
        raise ValueError(
            f"the rules say that there is no parameter such as {place.name!r} (where: unexpected): other layers, or "
            "others in number, than they were written for; mend them, or the arguments of the preset that they are of"
        )
    try:
        return bool(test(place))
    except Exception as error:
        raise RuntimeError(
            f"{rule.KIND} {rule.selector_text!r} failed on parameter {place.name!r} of {type(place.module).__name__}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _predicate_test(where: Callable[..., bool]) -> _Test:
    return lambda place: where(place.name, place.parameter, place.module)


def _depthwise_test() -> _Test:
    def test(place: ModelParameter) -> bool:
        channels = getattr(place.module, "in_channels", None)
        return channels is not None and channels == getattr(place.module, "groups", None)

    return test


def _marked_test() -> _Test:
    return lambda place: getattr(place.parameter, "_no_weight_decay", False)


def _no_weight_decay_test() -> _Test:
    names_match = functools.cache(_listed_names)
    return lambda place: place.lister is not None and names_match(place.lister[0])(_listed_name(place))


def _no_weight_decay_keywords_test() -> _Test:
    keywords = functools.cache(lambda lister: _asked(lister, "no_weight_decay_keywords"))
    return lambda place: (
        place.lister is not None and any(keyword in _listed_name(place) for keyword in keywords(place.lister[0]))
    )


def _listed_names(lister: nn.Module) -> Callable[[str], bool]:
    """Whether a name is one that a module lists, or matches a glob there."""
    names = {plain_name(name) for name in _asked(lister, "no_weight_decay")}
    matches = [compile_pattern(name) for name in names if set(name) & set("*?[")]
    return lambda name: name in names or any(match(name) for match in matches)


def _listed_name(place: ModelParameter) -> str:
    """The name of a parameter as the module that lists what is not to decay sees it."""
    assert place.lister is not None
    return place.name.removeprefix(place.lister[1])


def _asked(lister: nn.Module, method: str) -> list[str]:
    """What a module lists, by a method or an attribute; to be asked once, as some make their lists anew each time."""
    found = getattr(lister, method, ())
    return list(found() if callable(found) else found)


def _unexpected_test() -> _Test:
    return lambda place: True


_NAMED_TESTS: dict[str, Callable[[], _Test]] = {
    "depthwise": _depthwise_test,
    "marked": _marked_test,
    "no_weight_decay": _no_weight_decay_test,
    "no_weight_decay_keywords": _no_weight_decay_keywords_test,
    "unexpected": _unexpected_test,
}


def _class_test(selector: str | type) -> Callable[[type], bool]:
    """Whether a module's class is one that the selector means; answers are kept, as models repeat few classes."""
    known: dict[type, bool] = {}
    names_match = compile_pattern(selector) if isinstance(selector, str) else None
    wanted = selector if isinstance(selector, type) else _imported_class(selector)

    def test(cls: type) -> bool:
        if cls not in known:
            known[cls] = (wanted is not None and issubclass(cls, wanted)) or (
                names_match is not None and any(map(names_match, _class_names(cls, str(selector))))
            )
        return known[cls]

    return test


def _class_names(cls: type, selector: str) -> Iterable[str]:
    """The names of a class and its bases that a selector is held against: full ones if it has dots itself."""
    dotted = "." in selector and not selector.startswith(REGEX_PREFIX)
    return [class_path(base) if dotted else base.__name__ for base in cls.__mro__ if base is not object]


def _imported_class(path: str) -> type | None:
    """The class at a path like ``torch.nn.LayerNorm``. Nothing is imported: a model that has one has imported it."""
    module, _, name = path.rpartition(".")
    found = vars(sys.modules[module]).get(name) if module in sys.modules else None
    return found if isinstance(found, type) else None


def problem_of(matcher: Matcher, module: nn.Module, parameters: Sequence[ModelParameter]) -> str | None:
    """What is wrong with a rule whatever the others take: a pattern, class or combination that nothing matches."""
    names = [name for p in parameters for name in p.names]
    for pattern in patterns_of(matcher.rule):
        if not any(map(compile_pattern(pattern), names)):
            return f"no parameter name matches {pattern!r}; {_pattern_hint(pattern, names)}"
    owners = dict.fromkeys(class_of(place.module) for p in parameters for place in p.places)
    for selector in classes_of(matcher.rule):
        test = _class_test(selector)
        if not any(map(test, owners)):
            return _class_problem(class_text(selector), test, dict.fromkeys(map(class_of, module.modules())))
    if any(map(matcher.takes, parameters)):
        return None
    bounded = matcher.rule.min_ndim is not None or matcher.rule.max_ndim is not None
    dimensions = f"; the model's have {listed(sorted({p.ndim for p in parameters}))} dimensions" if bounded else ""
    return f"no parameter passes all its selectors{dimensions}"


def _class_problem(wanted: str, test: Callable[[type], bool], classes: Iterable[type]) -> str:
    if any(map(test, classes)):
        return (
            f"modules of class {wanted!r} own no parameters themselves, only those inside them do; select by the path, "
            "as in params='encoder.*'"
        )
    return f"no module is of a class {wanted!r}; {hint(wanted, [cls.__name__ for cls in classes])}"


def _pattern_hint(pattern: str, names: Sequence[str]) -> str:
    """How to mend a pattern that matches no name: a wildcard that is missing, or a name that is near."""
    if not pattern.startswith(REGEX_PREFIX):
        for candidate in _wider(pattern.strip()):
            if any(map(compile_pattern(candidate), names)):
                return f"the whole name must match: did you mean {candidate!r}?"
        for candidate in _wider(pattern.replace("[", "[[]")) if "[" in pattern else ():
            if any(map(compile_pattern(candidate), names)):
                return f"a bracket in a glob stands for a class of characters: did you mean {candidate!r}?"
        if any(character in pattern for character in "|,{"):
            return "a glob knows no alternatives: write a list of patterns, or a regular expression after 're:'"
    return f"nearest: {listed(nearest_names(pattern, names))}"


def _wider(pattern: str) -> tuple[str, ...]:
    return pattern, f"*{pattern}", f"{pattern}*", f"*{pattern}*"


def nearest_names(pattern: str, names: Sequence[str]) -> list[str]:
    """Up to three parameter names that resemble a pattern, part by part of the path; the first names where none does.

    >>> nearest_names("haed.*", ["body.weight", "head.weight", "head.bias"])
    ['head.weight', 'head.bias']
    >>> nearest_names("encoder.layer.0.*", ["encoder.norm.weight", "layers.1.weight", "layers.0.weight"])
    ['layers.0.weight']
    """
    wanted = tuple(literal_text(pattern).split("."))
    alike = functools.cache(_part_resemblance)
    best: dict[tuple[str, ...], float] = {}
    scores = []
    for name in names[:_MOST_NAMES]:
        path = tuple(name.split("."))
        if path not in best:
            best[path] = _aligned(wanted, path, alike)
        scores.append((best[path], name))
    close = sorted((score for score in dict.fromkeys(scores) if score[0] >= _ALIKE), key=lambda score: -score[0])
    if not set(pattern) & set("*?["):  # a name, that can be compared as a whole
        close = sorted(close[:_MOST_COMPARED], key=lambda score: (-score[0], -_resemblance(pattern, score[1])))
    return [name for _, name in close[:3]] or list(names[:3])


_ALIKE, _SAME_WORD = 0.5, 0.6


def _aligned(wanted: tuple[str, ...], path: tuple[str, ...], alike: Callable[[str, str], float]) -> float:
    """How much of the parts that are wanted a path has, in their order: 1 for all."""
    row = [0.0] * (len(path) + 1)
    for part in wanted:
        above = row
        row = [0.0]
        for number, other in enumerate(path, start=1):
            row.append(max(row[-1], above[number], above[number - 1] + alike(part, other)))
    return row[-1] / len(wanted)


def _part_resemblance(a: str, b: str) -> float:
    found = _resemblance(a, b)
    return found if found >= _SAME_WORD else 0.0


def _resemblance(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def listed(items: Iterable[object], separator: str = ", ") -> str:
    """Items quoted, for messages."""
    return separator.join(map(repr, items))
