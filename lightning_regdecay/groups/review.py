"""What is wrong with rules for a model: those that take nothing, and patterns and classes that match nothing."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_regdecay.groups.matching import Matcher, problem_of
from lightning_regdecay.groups.parameters import ModelParameter
from lightning_regdecay.rules.selectors import classes_of, patterns_of

_LONGEST_LABEL = 60
"""Selectors of a rule that are longer do not name it in messages."""


def review(
    module: nn.Module,
    matchers: Sequence[Matcher],
    parameters: Sequence[ModelParameter],
    trainable: Sequence[ModelParameter],
    taken_by: Sequence[set[int | None]],
    problems: list[str],
    remarks: list[str],
) -> None:
    """Note what is wrong with the rules of one kind, a line each, and what is worth a remark only.

    Wrong are rules that take nothing, and patterns and classes that match nothing.
    """
    used = {taker for takers in taken_by for taker in takers}
    for index, matcher in enumerate(matchers):
        rule = matcher.rule
        if rule.optional:
            continue
        text = rule.selector_text
        label = f"{rule.KIND} {index + 1} {f'of group {rule.group!r}' if len(text) > _LONGEST_LABEL else repr(text)}"
        if index in used and len(patterns_of(rule)) < 2 and len(classes_of(rule)) < 2:
            continue
        problem = problem_of(matcher, module, parameters)
        if problem is not None:
            problems.append(f"{label} {'is wrong in part' if index in used else 'takes nothing'}: {problem}")
        elif index not in used and rule.is_partial and _is_alone(index, matcher, trainable, taken_by):
            problems.append(f"{label} takes nothing: it has no rows of the parameters that it matches")
        elif index not in used:
            takers = [by - {None} for p, by in zip(trainable, taken_by) if by != {None} and matcher.takes(p)]
            earlier_ones = matchers[:index]
            frozen = (p for p in parameters if not p.parameter.requires_grad and matcher.takes(p))
            takes_frozen = any(not any(m.takes(p) for m in earlier_ones) for p in frozen)
            if takers and not takes_frozen:
                numbers = sorted({number for by in takers for number in by if number is not None})
                earlier = ", ".join(f"rule {i + 1} {matchers[i].rule.selector_text!r}" for i in numbers)
                problems.append(
                    f"{label} takes nothing: the {len(takers)} trainable parameters that it matches are all taken by "
                    f"earlier rules, {earlier}; the first match wins, so move it before them"
                )
            else:
                remarks.append(f"{label} takes frozen parameters only (requires_grad=False), so it makes no group")


def _is_alone(
    index: int, matcher: Matcher, trainable: Sequence[ModelParameter], taken_by: Sequence[set[int | None]]
) -> bool:
    """Whether a rule matches parameters, of which no earlier rule takes anything."""
    numbers = [by for p, by in zip(trainable, taken_by) if matcher.takes(p)]
    return bool(numbers) and not any(number is not None and number < index for by in numbers for number in by)
