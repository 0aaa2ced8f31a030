"""λ as a number or over time, and the hook that keeps an optimizer's λ on its schedule. Knows no rules and no model."""

from __future__ import annotations

import functools
import math
import numbers
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Any, Literal

import torch
from lightning.fabric.utilities import rank_zero_warn
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, NAdam, Optimizer, RAdam, RMSprop

from lightning_regdecay.names import hint

Kind = Literal["constant", "linear", "cosine", "exponential", "follow_lr", "timescale"]

_SCHEDULE_KEY = "decay_schedule"
"""Where a param group holds the fields of its schedule, as plain data."""
STEP_KEY = "decay_step"
"""Where a param group counts the optimizer steps that it has done, so that every checkpoint of an optimizer has it."""
STRENGTH_KEYS = {"weight_decay", _SCHEDULE_KEY, STEP_KEY}
"""All that a param group holds of its λ."""
_LENGTHS = ("steps", "epochs")
_DELAYS = ("delay_steps", "delay_epochs")
_TAKES: dict[str, tuple[str, ...]] = {
    "constant": ("start", *_DELAYS),
    "linear": ("start", "end", *_LENGTHS, *_DELAYS),
    "cosine": ("start", "end", *_LENGTHS, *_DELAYS),
    "exponential": ("start", "end", *_LENGTHS, *_DELAYS),
    "follow_lr": ("start", "peak_lr"),
    "timescale": (*_LENGTHS, "peak_lr"),
}
"""The fields of each kind of schedule."""


@dataclass(frozen=True, repr=False)
class DecaySchedule:
    r"""A weight decay that changes while training.

    With t the optimizer steps done so far, D the delay, T the length, all in optimizer steps, and
    p = min(max((t - D) / T, 0), 1):

    ============= ==========================================================
    constant      λ = start from t = D on, 0 before
    linear        λ = start + (end - start) · p
    cosine        λ = end + (start - end) · (1 + cos πp) / 2
    exponential   λ = start · (end / start)^p
    follow_lr     λ = start · lr / peak lr
    timescale     λ = 1 / (peak lr · T), for decoupled optimizers
    ============= ==========================================================

    ``follow_lr`` is the corrected weight decay of Defazio 2025, "Why Gradients Rapidly Increase Near the End of
    Training". ``timescale`` is the average over the last T steps that decoupled weight decay makes of the updates, of
    Wang & Aitchison 2024, arXiv 2405.13698.

    Args:
        schedule: which of these it is.
        start: λ at the start; for ``follow_lr`` the λ at the peak of the lr.
        end: λ at the end.
        steps: T in optimizer steps.
        epochs: T in epochs instead, whole or not. With neither, the schedule ends with the run.
        delay_steps: D in optimizer steps.
        delay_epochs: D in epochs instead.
        peak_lr: the peak of the group's lr. By default the ``max_lr`` of the param group, which ``OneCycleLR`` and
            ``CyclicLR`` set, else its ``initial_lr``, which every scheduler sets, else its ``lr``. Schedulers that go
            above the lr of the optimizer (a ``LambdaLR`` with factors above 1) need it.

    Raises:
        TypeError: for a value of the wrong kind, or a field that this schedule does not have.
        ValueError: for a value out of range, a field that is missing, or a length in two units.

    >>> DecaySchedule("cosine", 0.04, 0.4)
    DecaySchedule('cosine', 0.04, 0.4)
    >>> DecaySchedule("linear", 0.1, 0.0, epochs=10, delay_epochs=5).text
    'linear 0.1 to 0 over 10 epochs after 5 epochs'
    """

    schedule: Kind
    start: float | None = None
    end: float | None = None
    steps: int | None = None
    epochs: float | None = None
    delay_steps: int | None = None
    delay_epochs: float | None = None
    peak_lr: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, str):
            raise TypeError(
                f"schedule must be one of {', '.join(_TAKES)}, got {self.schedule!r}; a value has one schedule only"
            )
        if self.schedule not in _TAKES:
            raise ValueError(f"unknown schedule {self.schedule!r}; {hint(self.schedule, _TAKES)}")
        checked = {
            "start": nonnegative_number("start", self.start),
            "end": nonnegative_number("end", self.end),
            "steps": _whole("steps", self.steps, least=1),
            "epochs": _positive("epochs", self.epochs),
            "delay_steps": _whole("delay_steps", self.delay_steps, least=0),
            "delay_epochs": nonnegative_number("delay_epochs", self.delay_epochs),
            "peak_lr": _positive("peak_lr", self.peak_lr),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
            if value is not None and name not in _TAKES[self.schedule]:
                raise TypeError(f"a {self.schedule} schedule has no {name}; it has {', '.join(_TAKES[self.schedule])}")
        for name in ("start", "end"):
            if name in _TAKES[self.schedule] and checked[name] is None:
                raise ValueError(f"a {self.schedule} schedule needs {name}, the λ that it has there")
        for pair in (_LENGTHS, _DELAYS):
            if all(checked[name] is not None for name in pair):
                raise ValueError(f"{pair[0]} and {pair[1]} say the same thing twice: give one of them")
        if self.schedule == "timescale" and self.steps is None and self.epochs is None:
            raise ValueError("a timescale needs steps or epochs: the time over which updates are averaged")
        if self.schedule == "exponential" and not (self.start and self.end):
            raise ValueError(
                f"an exponential schedule goes between values above 0, got {self.start:g} and {self.end:g}; use linear "
                "or cosine to reach 0"
            )

    def __repr__(self) -> str:
        given = self.as_dict()
        parts = [repr(given.pop(name)) for name in ("schedule", "start", "end") if name in given]
        return f"DecaySchedule({', '.join([*parts, *(f'{name}={value!r}' for name, value in given.items())])})"

    @property
    def text(self) -> str:
        """The schedule in words that fit a table cell."""
        lengths = [f"{value:g} {name}" for name in _LENGTHS if (value := getattr(self, name)) is not None]
        over = "".join(f" over {length}" for length in lengths)
        delays = [(value, name.removeprefix("delay_")) for name in _DELAYS if (value := getattr(self, name))]
        after = "".join(f" after {value:g} {unit}" for value, unit in delays)
        if self.schedule == "timescale":
            return f"timescale {lengths[0]}"
        if self.end is None:
            return f"{self.schedule} {self.start:g}{after}"
        return f"{self.schedule} {self.start:g} to {self.end:g}{over}{after}"

    def as_dict(self) -> dict[str, Any]:
        """The fields that were given, as plain data that ``DecaySchedule(**data)`` takes.

        >>> DecaySchedule("follow_lr", "0.1").as_dict()
        {'schedule': 'follow_lr', 'start': 0.1}
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def value(
        self, step: int, *, length: int | None = None, delay: int = 0, lr: float = 1.0, peak_lr: float = 1.0
    ) -> float:
        """λ for one optimizer step, by the formulas above.

        Args:
            step: t, the optimizer steps done before it.
            length: T in optimizer steps, for schedules that have one.
            delay: D in optimizer steps.
            lr: the group's lr at this step, for ``follow_lr``.
            peak_lr: the peak of the group's lr, for ``follow_lr`` and ``timescale``.
        """
        start, end = self.start or 0.0, self.end or 0.0
        if self.schedule == "constant":
            return start if step >= delay else 0.0
        if self.schedule == "follow_lr":
            return start * lr / peak_lr
        assert length is not None
        if self.schedule == "timescale":
            return 1 / (peak_lr * length)
        p = min(max((step - delay) / length, 0.0), 1.0)
        if p in (0.0, 1.0):
            return end if p else start  # to the last bit
        if self.schedule == "linear":
            return start + (end - start) * p
        if self.schedule == "cosine":
            return end + (start - end) * (1 + math.cos(math.pi * p)) / 2
        return float(start * (end / start) ** p)


def schedule_weight_decay(
    optimizer: Optimizer, *, total_steps: float | None = None, steps_per_epoch: float | None = None
) -> None:
    """Keep the λ of every param group that has a schedule on it, at each step of an optimizer.

    The mixin does it by itself. Elsewhere (Fabric, plain PyTorch, several optimizers) call it once per optimizer, after
    the lr scheduler is made. The steps are counted in the param groups, so they go on from any checkpoint that
    ``optimizer.load_state_dict`` takes. A second call changes the lengths.

    Args:
        optimizer: over ``group.as_param_group()`` of decay groups.
        total_steps: the optimizer steps of the whole run, for schedules without a length of their own.
        steps_per_epoch: the optimizer steps of an epoch, for lengths and delays in epochs.

    Raises:
        ValueError: where a schedule needs one of these and it is not given; for a ``timescale`` with an optimizer that
            is coupled, or not known to be decoupled; for an lr of 0 at its peak.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> decay = DecaySchedule("linear", 0.5, 0.0).as_dict()
    >>> optimizer = torch.optim.AdamW([{"params": [weight], "weight_decay": 0.5, "decay_schedule": decay}])
    >>> schedule_weight_decay(optimizer, total_steps=4)
    >>> for _ in range(4):
    ...     optimizer.step()
    ...     print(optimizer.param_groups[0]["weight_decay"])
    0.5
    0.375
    0.25
    0.125
    """
    given = {
        "total_steps": _positive("total_steps", total_steps),
        "steps_per_epoch": _positive("steps_per_epoch", steps_per_epoch),
    }
    follow_schedules(optimizer, lambda: {name: value for name, value in given.items() if value is not None})
    refresh_schedules(optimizer)


def schedule_of(param_group: Mapping[str, Any]) -> DecaySchedule | None:
    """The schedule of a param group, None where it has none."""
    given = param_group.get(_SCHEDULE_KEY)
    return None if given is None else _parsed(tuple(given.items()))


@functools.lru_cache
def _parsed(given: tuple[tuple[str, Any], ...]) -> DecaySchedule:
    return DecaySchedule(**dict(given))


def strength_text(param_group: Mapping[str, Any]) -> str:
    """The λ of a param group in words: its schedule, or its value."""
    schedule = schedule_of(param_group)
    return schedule.text if schedule is not None else f"{float(param_group.get('weight_decay') or 0.0):g}"


def scheduled_param_group(schedule: DecaySchedule) -> dict[str, Any]:
    """What a param group holds for a schedule: its fields, the steps done, and the λ at the start."""
    return {"weight_decay": schedule.start or 0.0, _SCHEDULE_KEY: schedule.as_dict(), STEP_KEY: 0}


def follow_schedules(optimizer: Optimizer, lengths: Callable[[], Mapping[str, float]]) -> None:
    """As :func:`schedule_weight_decay`, for a caller that knows ``lengths()`` when training starts, not before."""
    for group in optimizer.param_groups:
        schedule = schedule_of(group)
        if schedule is not None and schedule.schedule == "timescale":
            _check_decoupled(optimizer, group)
    follower = _followers.get(optimizer)
    if follower is None:
        follower = _followers[optimizer] = _Follower()
        # Not to be compiled with the step: the count of the steps would be a constant, and each step be compiled anew.
        optimizer.register_step_pre_hook(torch.compiler.disable(follower.before_step))  # type: ignore[no-untyped-call]
        optimizer.register_load_state_dict_post_hook(follower.after_loading)
    follower.ask, follower.lengths = lengths, None


def refresh_schedules(optimizer: Optimizer) -> None:
    """Give every scheduled group the λ of its next step.

    Raises:
        ValueError: where a length that is needed is not known.
        RuntimeError: where groups have schedules that nobody follows.
    """
    inner = optimizer
    while inner not in _followers and hasattr(inner, "optimizer"):
        inner = inner.optimizer  # DeepSpeed and Fabric wrap optimizers
    if inner in _followers:
        _followers[inner].refresh(inner)
    elif any(schedule_of(group) is not None for group in optimizer.param_groups):
        raise RuntimeError(
            f"{type(optimizer).__name__} was built over decay groups with schedules, which nobody follows; call "
            "lightning_regdecay.schedules.schedule_weight_decay(optimizer, ...) where it is built"
        )


class _Follower:
    """Keeps one optimizer's λ on the schedules of its param groups."""

    def __init__(self) -> None:
        self.ask: Callable[[], Mapping[str, float]] = dict
        self.lengths: Mapping[str, float] | None = None
        """``total_steps`` and ``steps_per_epoch`` where they are known; None before they were asked for."""
        # Both by the id of a param group, which is kept so that no other gets its id.
        self._set: dict[int, tuple[dict[str, Any], float]] = {}
        self._seen: dict[int, tuple[dict[str, Any], set[int]]] = {}

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Set the λ of the step that begins, and count it."""
        if _is_rehearsal(optimizer):
            return
        for group in optimizer.param_groups:
            if _SCHEDULE_KEY in group and self._begins_step(group):
                self._check_untouched(group)
                self._set_weight_decay(group)
                group[STEP_KEY] = group.get(STEP_KEY, 0) + 1

    def after_loading(self, optimizer: Optimizer) -> None:
        """Take up the steps of the checkpoint."""
        self._set.clear()
        self._seen.clear()
        if self.lengths is not None:
            self.refresh(optimizer)

    def refresh(self, optimizer: Optimizer) -> None:
        """Set the λ of the next step."""
        for group in optimizer.param_groups:
            if _SCHEDULE_KEY in group:
                self._set_weight_decay(group)

    def _begins_step(self, group: dict[str, Any]) -> bool:
        """Whether this call is the first of a step; DeepSpeed ZeRO (0.19) makes one for each part of a group."""
        if not group["params"]:
            return False
        first = id(group["params"][0])
        _, seen = self._seen.setdefault(id(group), (group, set()))
        begins = not seen or first in seen
        if begins:
            seen.clear()
        seen.add(first)
        return begins

    def _check_untouched(self, group: dict[str, Any]) -> None:
        if id(group) not in self._set:
            return
        _, expected = self._set[id(group)]
        found = float(group["weight_decay"])
        if found != expected:
            raise RuntimeError(
                f"two schedules set the weight decay of group {group.get('name')!r}: that of its decay rule has set "
                f"{expected:g}, and something else {found:g}; take one of them away"
            )

    def _set_weight_decay(self, group: dict[str, Any]) -> None:
        value = self._weight_decay(group)
        held = group["weight_decay"]
        if isinstance(held, torch.Tensor):  # captured by a CUDA graph, or to spare torch.compile a new compilation
            held.fill_(value)
            value = float(held)
        else:
            group["weight_decay"] = value
        self._set[id(group)] = (group, value)

    def _weight_decay(self, group: dict[str, Any]) -> float:
        schedule = schedule_of(group)
        assert schedule is not None
        delay = self._steps(group, schedule.delay_steps, schedule.delay_epochs) or 0
        length = self._steps(group, schedule.steps, schedule.epochs)
        if length is None and "steps" in _TAKES[schedule.schedule]:
            length = max(round(self._length(group, "total_steps")) - delay, 1)
        step = group.get(STEP_KEY, 0)
        if "peak_lr" not in _TAKES[schedule.schedule]:
            return schedule.value(step, length=length, delay=delay)
        lr = float(group["lr"])
        peak_lr = schedule.peak_lr or _peak_lr(group)
        if schedule.schedule == "follow_lr" and lr > peak_lr:
            _warn_of_higher_lr(str(group.get("name")), lr, peak_lr)
        return schedule.value(step, length=length, lr=lr, peak_lr=peak_lr)

    def _steps(self, group: dict[str, Any], steps: int | None, epochs: float | None) -> int | None:
        """A time in optimizer steps, where it is given."""
        if epochs is None:
            return steps
        return max(round(epochs * self._length(group, "steps_per_epoch")), 1 if epochs else 0)

    def _length(self, group: dict[str, Any], name: str) -> float:
        if self.lengths is None:
            self.lengths = self.ask()
        if name not in self.lengths:
            of = "run" if name == "total_steps" else "epoch"
            raise ValueError(
                f"the schedule of group {group.get('name')!r} needs the length of the {of}, which is not known here; "
                "give the schedule its times in steps, or call lightning_regdecay.schedules.schedule_weight_decay("
                "optimizer, total_steps=..., steps_per_epoch=...)"
            )
        return self.lengths[name]


_followers: weakref.WeakKeyDictionary[Optimizer, _Follower] = weakref.WeakKeyDictionary()
"""By optimizer. Hooks of an optimizer cannot be asked for; they go when it is copied or pickled, and so does this."""

_COUPLED = (Adadelta, Adagrad, Adam, Adamax, ASGD, NAdam, RAdam, RMSprop, SGD)
_DECOUPLED = tuple(getattr(torch.optim, name) for name in ("AdamW", "Adafactor", "Muon") if hasattr(torch.optim, name))


def _peak_lr(group: Mapping[str, Any]) -> float:
    """The highest lr that a group will have, as far as its own values tell."""
    peak = float(group.get("max_lr", group.get("initial_lr", group.get("lr", 0.0))))
    if peak <= 0:
        raise ValueError(
            f"the schedule of group {group.get('name')!r} needs the peak of the lr, which is {peak:g} as far as can be "
            "seen here; give the schedule peak_lr"
        )
    return peak


@functools.cache
def _warn_of_higher_lr(name: str, lr: float, peak_lr: float) -> None:
    rank_zero_warn(
        f"the lr of group {name!r} is {lr:g}, above the peak {peak_lr:g} that its schedule follow_lr reckons with, so "
        "λ is above its start too; give the schedule peak_lr"
    )


def _is_rehearsal(optimizer: Optimizer) -> bool:
    """Whether a step is no step of the training.

    ``torch.distributed.checkpoint`` (2.6 and later) makes one with zero gradients and lr 0, to have the state of the
    optimizer before it loads or saves it.
    """
    if optimizer.state or any(group.get("lr") != 0 for group in optimizer.param_groups):
        return False
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return bool(gradients) and not any(bool(_local(gradient).any()) for gradient in gradients)


def _local(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient  # of a DTensor


def _check_decoupled(optimizer: Optimizer, group: Mapping[str, Any]) -> None:
    decoupled = _is_decoupled(optimizer, group)
    kind = type(optimizer).__name__
    if decoupled is None:
        raise ValueError(
            f"group {group.get('name')!r} has a timescale, and whether {kind} decouples weight decay from the gradient "
            "could not be found out; give λ as a number"
        )
    if not decoupled:
        raise ValueError(
            f"group {group.get('name')!r} has a timescale, which {kind} cannot have: it is coupled, so λ·w goes "
            "through the same moments as the gradient and the weights are no running average with the time scale "
            "1/(lr·λ); use a decoupled optimizer such as AdamW, or give λ as a number"
        )


def _is_decoupled(optimizer: Optimizer, group: Mapping[str, Any]) -> bool | None:
    """Whether an optimizer shrinks the weights beside the gradient step; None where that cannot be found out."""
    if "decoupled_weight_decay" in group:  # Adam, NAdam, RAdam
        return bool(group["decoupled_weight_decay"])
    if type(optimizer) in _COUPLED + _DECOUPLED:
        return type(optimizer) in _DECOUPLED
    # Of any other, two steps without a gradient tell: decoupled, they multiply a weight by 1 - lr·λ each.
    lr, decay = 0.125, 0.25
    options = {name: value for name, value in group.items() if name in optimizer.defaults}
    try:
        weight = torch.nn.Parameter(torch.ones(2, 2))
        twin = type(optimizer)([{**options, "params": [weight], "lr": lr, "weight_decay": decay}], lr=lr)  # type: ignore[call-arg]
        for _ in range(2):
            weight.grad = torch.zeros_like(weight)
            twin.step()
    except Exception:  # of whatever kind the optimizer of others raises
        return None
    return torch.allclose(weight, torch.full_like(weight, (1 - lr * decay) ** 2), rtol=1e-6)


def nonnegative_number(name: str, value: Any) -> float | None:
    """A coefficient from a number or its text; None where it is not given."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, Decimal, str)):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    number = number_of(value)
    if number is None:
        raise ValueError(f"{name} must be a number, got the text {value!r}")
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    return number


def number_of(value: Any) -> float | None:
    """A number from a number or its text, None where the text is none."""
    try:
        return float(value)
    except ValueError:
        return None
    except OverflowError:
        return math.inf


def _positive(name: str, value: Any) -> float | None:
    number = nonnegative_number(name, value)
    if number == 0:
        raise ValueError(f"{name} must be above 0, got {value!r}")
    return number


def _whole(name: str, value: Any, least: int) -> int | None:
    number = nonnegative_number(name, value)
    if number is None:
        return None
    if number != int(number) or number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return int(number)
