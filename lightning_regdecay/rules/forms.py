"""The forms that rules come in, parsed, and the plain data that they go out as. Knows no model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar, cast

from lightning_regdecay.rules.factors import resolved
from lightning_regdecay.rules.names import REGEX_PREFIX, hint, name_of_pattern, safe_name, unique_name
from lightning_regdecay.rules.presets import LR_PRESETS, PRESETS, is_preset, preset_rules
from lightning_regdecay.rules.rules import DecayRule, LrRule, is_schedule, strength_from
from lightning_regdecay.rules.scalars import number_of, plain_number
from lightning_regdecay.rules.schedules import DecaySchedule
from lightning_regdecay.rules.selectors import (
    RESERVED_GROUPS,
    SELECTORS,
    Rule,
    class_path,
    class_text,
    classes_of,
    equal_options,
    field_names,
    function_name,
    given_fields,
    name_of_test,
    patterns_of,
    shorter,
)
from lightning_regdecay.rules.stages import is_list
from lightning_regdecay.rules.toward import toward_from

DecayRules: TypeAlias = Mapping[str, Any] | Sequence[Any] | str
"""Rules in any form that users write: see :func:`parse_rules`."""
LrRules: TypeAlias = Mapping[str, Any] | Sequence[Any] | str
"""Lr rules, in the same forms: see :func:`parse_lr_rules`."""

_Rule = TypeVar("_Rule", bound=Rule)
_PRESETS: dict[type[Rule], Any] = {DecayRule: PRESETS, LrRule: LR_PRESETS}
KINDS: dict[str, type[Rule]] = {"decay_rules": DecayRule, "lr_rules": LrRule}
"""The kinds of rules, by the name of the attribute, hyperparameter and argument that holds them."""
_A_RULE: dict[type[Rule], str] = {DecayRule: "a DecayRule", LrRule: "an LrRule"}


def parse_rules(rules: DecayRules) -> tuple[DecayRule, ...]:
    """Turn rules, in any form that users write, into ``DecayRule`` objects in order, each with its group's name.

    Args:
        rules: a mapping ``{pattern: λ}``, ``{name: {field: value}}`` or ``{name: DecayRule(...)}``, mixed at will, or a
            list of ``DecayRule`` objects or their fields, or a preset by its name, ``"timm"``, or with its arguments,
            ``{"preset": "timm", "weight_decay": 0.05}``, alone or as an entry of the list.

    Raises:
        TypeError: for a form or a field that is not one of these.
        ValueError: for a value out of range, or rules of one group that disagree.

    >>> parse_rules({"*.bias": 0.0, "head": {"params": "head.*", "weight_decay": "1e-3"}})
    (DecayRule(0.0, params='*.bias', group='bias'), DecayRule(0.001, params='head.*', group='head'))
    """
    return parse_as(rules, DecayRule)


def parse_lr_rules(rules: LrRules | None) -> tuple[LrRule, ...]:
    """As :func:`parse_rules`, for lr rules: ``{pattern: lr}``, ``{name: {field: value}}``, ``LrRule`` objects, presets.

    Args:
        rules: in any form; None for none.

    >>> parse_lr_rules({"head.*": "1e-3", "backbone": {"params": "backbone.*", "lr_mult": 0.1}})
    (LrRule(0.001, params='head.*', group='head'), LrRule(lr_mult=0.1, params='backbone.*', group='backbone'))
    """
    return () if rules is None else parse_as(rules, LrRule)


def parse_as(rules: DecayRules, kind: type[_Rule]) -> tuple[_Rule, ...]:
    """The rules of one kind, in any form that users write, as objects; see :func:`parse_rules`."""
    rules = _with_preset(rules)
    if is_preset(rules):
        parsed = _from_preset(cast("Mapping[str, Any]", rules), kind)
    elif isinstance(rules, Mapping):
        parsed = [_from_item(key, value, kind) for key, value in rules.items()]
    elif isinstance(rules, Sequence) and not isinstance(rules, (str, bytes)):
        parsed = [pair for index, entry in enumerate(rules) for pair in _from_entry(index, entry, kind)]
    else:
        advice = "; text is the name of a preset, or must be read first, with yaml.safe_load or json.loads"
        advice = advice if isinstance(rules, str) else ""
        raise TypeError(f"{kind.KIND}s are a mapping or a list of rules, got {type(rules).__name__} {rules!r}{advice}")

    taken = RESERVED_GROUPS | {rule.group for _, rule in parsed if rule.group is not None}
    named = []
    for name, rule in parsed:
        if rule.group is None:
            rule = replace(rule, group=unique_name(name, taken))
        pieces = rule.one_by_one()
        taken.update(str(piece.group) for piece in pieces)
        named += pieces
    if kind is DecayRule:
        named = cast("list[_Rule]", resolved(cast("list[DecayRule]", named)))
    _check_agreement(named)
    return tuple(named)


def plain_rules(rules: Any) -> Any:
    """The same rules as plain data (``dict``, ``list``, ``str``, numbers), to be read where this package may be absent.

    A class becomes its full name, which selects the same modules. A predicate becomes text that says which one it was;
    it cannot be used as a rule again, and parsing it says so.

    >>> plain_rules({"norm": DecayRule(0, modules=[dict, "*Norm*"])})
    {'norm': {'weight_decay': 0.0, 'modules': ['builtins.dict', '*Norm*']}}
    """
    if isinstance(rules, str):
        return str(rules)
    rules = plain_number(rules)
    if rules is None or isinstance(rules, (bool, int, float)):
        return rules
    if isinstance(rules, Rule):
        return {name: plain_rules(shorter(value)) for name, value in given_fields(rules).items()}
    if isinstance(rules, DecaySchedule):
        plain = rules.as_dict()
        return plain.get("stages", plain)
    if isinstance(rules, Mapping):
        # A state dict among the fields of a rule is not to be written out.
        state = {key: repr(toward_from(value)) for key, value in rules.items() if key == "toward" and _is_state(value)}
        return {plain_rules(key): state.get(key) or plain_rules(value) for key, value in rules.items()}
    if hasattr(rules, "tolist"):  # of torch or NumPy
        return plain_rules(rules.tolist())
    if isinstance(rules, (Sequence, set, frozenset)):
        return [plain_rules(value) for value in rules]
    if isinstance(rules, type):
        return class_path(rules)
    return f"<{rules.__module__}.{function_name(rules)}>" if callable(rules) else repr(rules)


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and any(hasattr(tensor, "dtype") for tensor in value.values())


def shortest_rules(rules: DecayRules, kind: type[Rule] = DecayRule) -> dict[str, Any] | list[Any]:
    """The same rules as plain data, in the form that they have, each as short as it can be; numbers are numbers.

    >>> shortest_rules({"*.bias": DecayRule(0.0), "head": {"params": "head.*", "weight_decay": "1e-3"}})
    {'*.bias': 0.0, 'head': {'weight_decay': 0.001, 'params': 'head.*'}}
    """
    parse_as(rules, kind)  # which finds every mistake
    rules = _with_preset(rules)
    if is_preset(rules):
        return _plain_preset(cast("Mapping[str, Any]", rules))
    if isinstance(rules, Mapping):
        return {str(key): _shortest_item(key, value, kind) for key, value in rules.items()}
    every = map(_with_preset, rules)
    entries = [_plain_preset(entry) if is_preset(entry) else _rule("", entry, kind) for entry in every]
    return [plain_rules(entry) for entry in entries]


def copied_rules(rules: Any) -> Any:
    """The same rules in containers of their own, so that the user's may change: ``dict`` and ``list``, nested."""
    if isinstance(rules, Mapping):
        return {key: copied_rules(value) for key, value in rules.items()}
    if isinstance(rules, Sequence) and not isinstance(rules, (str, bytes)):
        return [copied_rules(value) for value in rules]
    return rules


def loggable_rules(rules: DecayRules, kind: type[Rule] = DecayRule) -> dict[str, Any]:
    """The same rules as a mapping of plain data, so that a logger has a value for each rule.

    >>> loggable_rules({"*.bias": 0.0, "head.*": "1e-3"})
    {'*.bias': 0.0, 'head.*': 0.001}
    >>> loggable_rules([DecayRule(0.0, max_ndim=1, group="vectors"), DecayRule(0.1)])
    {'vectors': {'weight_decay': 0.0, 'max_ndim': 1}, 'rest': {'weight_decay': 0.1, 'params': '*'}}
    """
    shortest = shortest_rules(rules, kind)
    if isinstance(shortest, dict):
        return shortest
    found: dict[str, Any] = {}
    for rule in parse_as(rules, kind):
        fields = plain_rules(rule)
        name = unique_name(fields["group"], found)
        if name == fields["group"]:
            del fields["group"]
        found[name] = fields if _has_selector(fields) else {**fields, "params": "*"}
    return found


def rules_by_group(rules: Mapping[str, Any], kind: type[Rule] = DecayRule) -> dict[str, Any]:
    """Plain rules with the names of their groups as keys, where patterns may not be keys.

    >>> rules_by_group({"*.bias": 0.0, "head": {"params": "head.*", "decay_mult": 0.5}})
    {'bias': {'params': '*.bias', 'weight_decay': 0.0}, 'head': {'params': 'head.*', 'decay_mult': 0.5}}
    """
    if is_preset(rules):
        return dict(rules)
    named: dict[str, Any] = {}
    for key, value in rules.items():
        given = value if isinstance(value, Mapping) and not is_schedule(value) else {kind.FIRST[0]: value}
        named[unique_name(name_of_pattern(key), named)] = given if _has_selector(given) else {"params": key, **given}
    return named


def _from_item(key: Any, value: Any, kind: type[_Rule]) -> tuple[str, _Rule]:
    """The group's name, unless the rule gives one itself, and the rule of one item of a mapping."""
    if not isinstance(key, str):
        raise TypeError(f"{kind.KIND}s map patterns or names (text) to rules, got the key {key!r}; write {str(key)!r}")
    if not isinstance(value, (Rule, Mapping)) or is_schedule(value):  # {pattern: λ}
        value = {kind.FIRST[0]: value, "params": key} if value is not None else {}
    label = f"{kind.KIND} {key!r}"
    if is_preset(value):
        raise TypeError(f"{label}: a preset has groups of its own; write it as an entry of a list, [{dict(value)!r}]")
    rule = _rule(label, value, kind)
    given = given_fields(rule)
    return name_of_pattern(key), rule if _has_selector(given) else _rule(label, {**given, "params": key}, kind)


def _shortest_item(key: str, value: Any, kind: type[Rule]) -> Any:
    """What stands beside a key in the shortest form of a mapping: its quantity alone, if it can."""
    _, rule = _from_item(key, value, kind)
    given = plain_rules(rule)
    if given.get("params") == key and len(SELECTORS & set(given)) == 1:
        del given["params"]
    return given[kind.FIRST[0]] if list(given) == [kind.FIRST[0]] else given


def _plain_preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """A preset by name with plain arguments, numbers as numbers."""
    numbers_read = {name: value if name == "preset" else _argument(value) for name, value in given.items()}
    return cast("dict[str, Any]", plain_rules(numbers_read))


def _argument(value: Any) -> Any:
    is_text = isinstance(value, str) and number_of(value) is None
    is_strength = not is_text and isinstance(value, (Mapping, DecaySchedule, str))
    is_strength |= is_list(value) and any(is_schedule(one) or isinstance(one, DecaySchedule) for one in value)
    return strength_from(value) if is_strength else plain_number(value)


def _from_entry(index: int, entry: Any, kind: type[_Rule]) -> list[tuple[str, _Rule]]:
    """The groups' names, unless the rules give them themselves, and the rules of one entry of a list."""
    entry = _with_preset(entry)
    if is_preset(entry):
        return _from_preset(entry, kind)
    if not isinstance(entry, (Rule, Mapping)):
        raise TypeError(
            f"{kind.KIND} {index + 1} of the list must be {_A_RULE[kind]} or a mapping of its fields, got {entry!r}; "
            f"write {kind.__name__}(0.05, params='*.weight'), or use the mapping {{'*.weight': 0.05}}"
        )
    rule = _rule(f"{kind.KIND} {index + 1} of the list", entry, kind)
    return [(_name_from_selectors(rule), rule)]


def _with_preset(rules: Any) -> Any:
    """The name of a preset alone as one with arguments, of which it has none; all else as it is."""
    is_name = isinstance(rules, str) and rules.isidentifier()
    return {"preset": str(rules)} if is_name else rules


def _from_preset(given: Mapping[str, Any], kind: type[_Rule]) -> list[tuple[str, _Rule]]:
    """The groups' names and the rules that a preset stands for."""
    rules = [_rule(f"preset {given['preset']!r}", fields, kind) for fields in preset_rules(given, _PRESETS[kind])]
    return [(str(rule.group), rule) for rule in rules]


def _rule(label: str, value: Rule | Mapping[str, Any], kind: type[_Rule]) -> _Rule:
    """A rule from its fields; every error says which rule it is about."""
    if isinstance(value, kind):
        return value
    if isinstance(value, Rule):
        own, other = _A_RULE[kind], _A_RULE[type(value)]
        argument = next(name for name, one in KINDS.items() if isinstance(value, one))
        raise TypeError(f"{label} must be {own}, got {other}, which goes into {argument}: {value!r}")
    known = field_names(kind)
    for name in value:
        if name not in known:
            raise TypeError(f"{label}: unknown field {name!r}; {hint(str(name), known)}; {_advice(name, kind)}")
    try:
        return kind(**value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{label}: {error}") from None


def _advice(name: str, kind: type[Rule]) -> str:
    """Where a field belongs that a rule does not have."""
    if kind is LrRule and name in DecayRule.FIRST:
        return "weight decay goes into decay_rules"
    if kind is DecayRule and name in field_names(DecaySchedule):
        if name == "schedule":
            return "a schedule, or a list of them, is the λ of a rule, as in {'*': [{schedule: linear, …}, …]}"
        return "a schedule says which one it is, as in {schedule: linear, start: 0.1, end: 0}"
    return "options of the optimizer, such as lr, go into options"


def _has_selector(fields: Iterable[str]) -> bool:
    return not SELECTORS.isdisjoint(fields)


def _name_from_selectors(rule: Rule) -> str:
    """The group's name of a rule that has none: from its patterns, else its classes, its dimensions, its predicate."""
    if patterns_of(rule):
        return safe_name("_".join(map(name_of_pattern, patterns_of(rule))))
    if classes_of(rule):
        return safe_name("_".join(name_of_pattern(_class_name(selector)) for selector in classes_of(rule)))
    bounds = "_".join(f"{name}_{bound}" for name, bound in rule._bounds())
    return bounds or (safe_name(name_of_test(rule.where)) if rule.where else name_of_pattern("*"))


def _class_name(selector: str | type) -> str:
    """An entry of ``modules`` less the path to the class, so that a class and its full name make the same group."""
    text = class_text(selector)
    return text if text.startswith(REGEX_PREFIX) else text.rpartition(".")[2]


def _check_agreement(rules: Sequence[Rule]) -> None:
    first: dict[str | None, Rule] = {}
    for rule in rules:
        other = first.setdefault(rule.group, rule)
        for name in (*rule.FIRST, *rule.AGREED):
            if not equal_options(getattr(rule, name), getattr(other, name)):
                raise ValueError(
                    f"the rules {other.selector_text!r} and {rule.selector_text!r} share the group {rule.group!r} but "
                    f"disagree on {name}: {getattr(other, name)!r} and {getattr(rule, name)!r}; make them equal or "
                    "give each a group of its own"
                )
