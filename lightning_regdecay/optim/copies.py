"""What becomes of an optimizer with decay rules when it is copied, pickled or written to a file: it refuses to step."""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

REDUCE = "__reduce_ex__"
"""What copies and pickles ask an object for, and find on the instance first."""
_PRE_HOOKS = "_optimizer_step_pre_hooks"
_REFUSAL = -1
"""The key of the hook by which a copy refuses to step; torch's own count from 0."""


def reduce_for_copy(
    reference: weakref.ref[Any],
    changes: Callable[[], bool],
    strip: Callable[[dict[str, Any]], dict[str, Any]],
    protocol: Any,
) -> Any:
    """What stands for an optimizer in a copy or a file: the same without our hooks, which refuses to step.

    Args:
        reference: to the optimizer.
        changes: tells whether its steps are others with the rules than without.
        strip: takes what is ours away from its attributes.
        protocol: of :mod:`pickle`.
    """
    optimizer: Any = reference()
    cls: Any = type(optimizer)
    reduced = cls.__reduce_ex__(optimizer, protocol)
    if not isinstance(reduced, tuple):
        return reduced
    make, args, *rest = reduced
    refuses = changes()
    if rest and isinstance(rest[0], dict):
        rest[0] = strip({key: value for key, value in rest[0].items() if key != REDUCE})
        if refuses and _PRE_HOOKS in rest[0]:
            rest[0][_PRE_HOOKS] = OrderedDict({**rest[0][_PRE_HOOKS], _REFUSAL: refuse_step})
    return (_made_to_refuse, (make, args), *rest) if refuses else (make, args, *rest)


def _made_to_refuse(make: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """An optimizer that refuses to step, and whose copies do."""
    optimizer = make(*args)
    own = vars(optimizer)
    own[REDUCE] = functools.partial(reduce_for_copy, weakref.ref(optimizer), _always, _as_it_is)
    if has_hooks(type(optimizer)):
        own[_PRE_HOOKS] = OrderedDict({**own.get(_PRE_HOOKS, {}), _REFUSAL: refuse_step})
    else:
        own["step"] = functools.partial(refuse_step, type(optimizer))
    return optimizer


def end_refusal(optimizer: Any) -> None:
    """Let a copy step again."""
    own = vars(optimizer)
    own.get(_PRE_HOOKS, {}).pop(_REFUSAL, None)
    for name in ("step", REDUCE):
        if isinstance(own.get(name), functools.partial) and own[name].func in (refuse_step, reduce_for_copy):
            del own[name]


def refuse_step(optimizer: Any, *args: Any, **kwargs: Any) -> None:
    """Refuse to step: the step pre-hook of a copy.

    Raises:
        RuntimeError: always.
    """
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    raise RuntimeError(
        f"this {kind.__name__} is a copy of an optimizer with decay rules in force, and a copy has none; "
        "call lightning_regdecay.apply_decay_rules(copy, model, rules), or schedule_weight_decay(copy) where it was "
        "built over decay groups"
    )


def has_hooks(cls: type) -> bool:
    """Whether the step of a class calls the hooks of the optimizer."""
    return bool(getattr(getattr(cls, "step", None), "hooked", False))


def _always() -> bool:
    return True


def _as_it_is(state: dict[str, Any]) -> dict[str, Any]:
    return state
