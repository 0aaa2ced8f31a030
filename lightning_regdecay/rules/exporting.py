"""Rules → text that another project can paste."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import yaml  # type: ignore[import-untyped]

from lightning_regdecay.rules.forms import KINDS, DecayRules, LrRules, parse_lr_rules, parse_rules, shortest_rules
from lightning_regdecay.rules.scalars import number_of
from lightning_regdecay.rules.selectors import Rule
from lightning_regdecay.rules.toward import GivenStart


def rules_as_yaml(rules: DecayRules, *, lr_rules: LrRules | None = None) -> str:
    """Write rules as YAML, a line per rule, to be pasted into another project.

    ``yaml.safe_load`` reads it back to the same rules, numbers to the last bit; so do OmegaConf and LightningCLI.
    Numbers are written so that every reader takes them for numbers (PyYAML takes ``1e-3`` for text). A class among the
    selectors becomes its full name, which selects the same modules. A preset stays the name that it is given by.

    Args:
        rules: in any form, see :func:`~lightning_regdecay.rules.forms.parse_rules`.
        lr_rules: lr rules that cross them; both are then written under their names, ``decay_rules`` and ``lr_rules``.

    Raises:
        TypeError: for rules of an unknown form.
        ValueError: for a rule with a predicate of the user's (``where``), or an option that is no plain data; text can
            hold neither.

    >>> print(rules_as_yaml({"*.bias": 0, "encoder": {"params": ["enc.*", "emb.*"], "weight_decay": "1e-5"}}), end="")
    '*.bias': 0.0
    encoder: {weight_decay: 1.0e-05, params: [enc.*, emb.*]}
    """
    given: dict[str, Any] = {"decay_rules": rules, **({} if lr_rules is None else {"lr_rules": lr_rules})}
    for rule_set in (parse_rules(rules), parse_lr_rules(lr_rules)):
        _check(rule_set)
    shortest = {name: shortest_rules(one, KINDS[name]) for name, one in given.items()}
    root: Any = shortest["decay_rules"] if lr_rules is None else shortest
    node = yaml.SafeDumper("", sort_keys=False).represent_data(root)
    _lay_out(node, [node] if lr_rules is None else [node, *(value for _, value in node.value)])
    return str(yaml.serialize(node, Dumper=yaml.SafeDumper, allow_unicode=True, width=120))


def _check(rules: Sequence[Rule]) -> None:
    """Raise for rules that text cannot hold."""
    for number, rule in enumerate(rules, start=1):
        label = f"{rule.KIND} {number} {rule.selector_text!r} cannot be written as YAML"
        if callable(rule.where):
            raise ValueError(
                f"{label}: where is a function, which text cannot hold; select by params, modules, min_ndim and "
                "max_ndim instead, or leave this rule in code"
            )
        if callable(getattr(rule, "rows", None)):
            raise ValueError(f"{label}: rows is a function, which text cannot hold; write a slice, or a list of rows")
        if isinstance(getattr(rule, "toward", None), GivenStart):
            raise ValueError(f"{label}: toward is a state dict, which text cannot hold; write the path of a file")
        for name, value in rule.options.items():
            if not _is_plain(value):
                raise ValueError(f"{label}: the option {name!r} is {value!r}, which is no plain data; set it in code")


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(entry) for pair in value.items() for entry in pair)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, numbers.Real)) or hasattr(value, "tolist")


def _lay_out(root: Any, blocks: list[Any]) -> None:
    """A line per entry of some nodes, and quotes where a reader may take text for something else."""
    nodes = [root]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.ScalarNode):
            node.style = _quotes(node.value) if node.tag == "tag:yaml.org,2002:str" else node.style
        else:
            node.flow_style = all(node is not block for block in blocks)
            nodes += [n for pair in node.value for n in pair] if isinstance(node, yaml.MappingNode) else node.value


def _quotes(text: str) -> str | None:
    if not text.isprintable():
        return '"'  # PyYAML (6.0) writes a next line character (U+0085) bare, and reads it as a blank
    # PyYAML takes 1e-3 for text, the YAML 1.2 readers of OmegaConf and LightningCLI for a number.
    return None if number_of(text) is None else "'"
