"""The hook that keeps the λ of an optimizer's param groups on their schedules."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, NAdam, Optimizer, RAdam, RMSprop
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_regdecay.rules.scalars import positive_number
from lightning_regdecay.rules.schedules import FIELDS, PEAK_KEY, SCHEDULE_KEY, STEP_KEY, DecaySchedule, schedule_of


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
        "total_steps": positive_number("total_steps", total_steps),
        "steps_per_epoch": positive_number("steps_per_epoch", steps_per_epoch),
    }
    follow_schedules(optimizer, lambda: {name: value for name, value in given.items() if value is not None})
    refresh_schedules(optimizer)


def scheduled_param_group(schedule: DecaySchedule) -> dict[str, Any]:
    """What a param group holds for a schedule: its fields, the steps done, and a λ until the first step sets it."""
    watch_for_unfollowed_schedules()
    return {"weight_decay": schedule.start or 0.0, SCHEDULE_KEY: schedule.as_dict(), STEP_KEY: 0}


@functools.cache
def watch_for_unfollowed_schedules() -> None:
    """From now on, refuse steps of any optimizer whose param groups have schedules that nobody follows."""

    def refuse(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer in _followers or not any(SCHEDULE_KEY in group for group in optimizer.param_groups):
            return
        # An optimizer inside another, with the same param groups, as in sharpness-aware minimization.
        outer = next((o for o in _followers if o.param_groups[0] is optimizer.param_groups[0]), None)
        if outer is None:
            raise _unfollowed(optimizer)
        if not _followers[outer].is_inside_step:
            _followers[outer].before_step(optimizer, args, kwargs)
            _followers[outer].is_inside_step = False

    register_optimizer_step_pre_hook(torch.compiler.disable(refuse))  # type: ignore[no-untyped-call]


def follow_schedules(optimizer: Optimizer, lengths: Callable[[], Mapping[str, float]]) -> None:
    """As :func:`schedule_weight_decay`, for a caller that knows the lengths only when training starts.

    Args:
        optimizer: as there.
        lengths: tells what is known of ``total_steps`` and ``steps_per_epoch``; asked when one is needed first.

    Raises:
        ValueError: for a ``timescale`` with an optimizer that is coupled, or not known to be decoupled.
    """
    for group in optimizer.param_groups:
        schedule = schedule_of(group)
        if schedule is not None and schedule.schedule == "timescale":
            _check_decoupled(optimizer, group)
        if schedule is not None and "peak_lr" in FIELDS[schedule.schedule] and "lr" in group:
            # Noted now, before anything changes the lr: `initial_lr` is not set by all schedulers, and changed by some.
            group.setdefault(PEAK_KEY, max(float(group["lr"]), float(group.get("initial_lr", 0.0))))
    follower = _followers.get(optimizer)
    if follower is None:
        follower = _followers[optimizer] = _Follower()
        # Not to be compiled with the step: the count of the steps would be a constant, and each step be compiled anew.
        optimizer.register_step_pre_hook(torch.compiler.disable(follower.before_step))  # type: ignore[no-untyped-call]
        optimizer.register_step_post_hook(torch.compiler.disable(follower.after_step))  # type: ignore[no-untyped-call]
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
        raise _unfollowed(optimizer)


def _unfollowed(optimizer: Optimizer) -> RuntimeError:
    return RuntimeError(
        f"{type(optimizer).__name__} has param groups with schedules of the weight decay, which nobody follows; call "
        "lightning_regdecay.optim.following.schedule_weight_decay(optimizer, ...) where it is built"
    )


class _Follower:
    """Keeps one optimizer's λ on the schedules of its param groups."""

    def __init__(self) -> None:
        self.is_inside_step = False
        self.ask: Callable[[], Mapping[str, float]] = dict
        self.lengths: Mapping[str, float] | None = None
        """``total_steps`` and ``steps_per_epoch`` where they are known; None before they were asked for."""
        # Both by the id of a param group, which is kept so that no other gets its id.
        self._set: dict[int, tuple[dict[str, Any], float]] = {}
        self._seen: dict[int, tuple[dict[str, Any], set[int]]] = {}
        self._warned: set[str] = set()

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Set the λ of the step that begins, and count it."""
        self.is_inside_step = True
        if _is_rehearsal(optimizer):
            return
        for group in optimizer.param_groups:
            if SCHEDULE_KEY in group and self._begins_step(group):
                self._check_untouched(group)
                self._set_weight_decay(group)
                group[STEP_KEY] = group.get(STEP_KEY, 0) + 1

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Note that the step is over."""
        self.is_inside_step = False

    def after_loading(self, optimizer: Optimizer) -> None:
        """Take up the steps of the checkpoint."""
        self._set.clear()
        self._seen.clear()
        if self.lengths is not None:
            self.refresh(optimizer)

    def refresh(self, optimizer: Optimizer) -> None:
        """Set the λ of the next step."""
        for group in optimizer.param_groups:
            if SCHEDULE_KEY in group:
                self._set_weight_decay(group)

    def _begins_step(self, group: dict[str, Any]) -> bool:
        """Whether this call is the first of a step.

        DeepSpeed ZeRO (0.19) makes one for each part of a group, with another first parameter. So a call counts when
        its first parameter had a turn already; one that has just taken the place of another does not count.
        """
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
        if isinstance(held, torch.Tensor):  # which spares a torch.compiled step a compilation for each new value
            held.fill_(value)
            value = float(held)
        else:
            group["weight_decay"] = value
        self._set[id(group)] = (group, value)

    def _weight_decay(self, group: dict[str, Any]) -> float:
        schedule = schedule_of(group)
        assert schedule is not None
        delay = self._in_steps(group, schedule.delay_steps, schedule.delay_epochs) or 0
        length = self._in_steps(group, schedule.steps, schedule.epochs)
        if length is None and "steps" in FIELDS[schedule.schedule]:
            length = max(round(self._length(group, "total_steps")) - delay, 1)
        step = group.get(STEP_KEY, 0)
        if "peak_lr" not in FIELDS[schedule.schedule]:
            return schedule.value(step, length=length, delay=delay)
        lr = float(group["lr"])
        peak_lr = schedule.peak_lr or _peak_lr(group)
        if schedule.schedule == "follow_lr" and lr > peak_lr:
            self._warn_of_higher_lr(str(group.get("name")), lr, peak_lr)
        return schedule.value(step, length=length, lr=lr, peak_lr=peak_lr)

    def _warn_of_higher_lr(self, name: str, lr: float, peak_lr: float) -> None:
        if name not in self._warned:
            self._warned.add(name)
            rank_zero_warn(
                f"the lr of group {name!r} is {lr:g}, above the peak {peak_lr:g} that its schedule follow_lr reckons "
                "with: λ stays at its start there; give the schedule peak_lr"
            )

    def _in_steps(self, group: dict[str, Any], steps: int | None, epochs: float | None) -> int | None:
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
                "give the schedule its times in steps, or call lightning_regdecay.optim.following."
                "schedule_weight_decay(optimizer, total_steps=..., steps_per_epoch=...)"
            )
        return self.lengths[name]


_followers: weakref.WeakKeyDictionary[Optimizer, _Follower] = weakref.WeakKeyDictionary()
"""By optimizer, as torch has no public way to ask one for its hooks. A copy has none, and is not here either."""

_COUPLED = (Adadelta, Adagrad, Adam, Adamax, ASGD, NAdam, RAdam, RMSprop, SGD)
_DECOUPLED = tuple(getattr(torch.optim, name) for name in ("AdamW", "Adafactor", "Muon") if hasattr(torch.optim, name))


def _peak_lr(group: Mapping[str, Any]) -> float:
    """The highest lr that a group will have, as far as its own values tell."""
    peak = float(group.get("max_lr", group.get(PEAK_KEY, group.get("lr", 0.0))))
    if peak <= 0:
        raise ValueError(
            f"the schedule of group {group.get('name')!r} needs the peak of the lr, which is {peak:g} as far as can be "
            "seen here; give the schedule peak_lr"
        )
    return peak


def _is_rehearsal(optimizer: Optimizer) -> bool:
    """Whether a step is no step of the training.

    ``torch.distributed.checkpoint`` (2.6 and later) makes one with zero gradients and lr 0, to have the state of the
    optimizer before it loads or saves it.
    """
    if optimizer.state or any(group.get("lr") != 0 for group in optimizer.param_groups):
        return False
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return bool(gradients) and not any(map(_has_values, gradients))


def _has_values(gradient: torch.Tensor) -> bool:
    """Whether a gradient is not zero; of a ``DTensor`` the whole, so that all ranks find the same."""
    norm: Any = torch.linalg.vector_norm(gradient)
    return bool((norm.full_tensor() if hasattr(norm, "full_tensor") else norm) != 0)


def _check_decoupled(optimizer: Optimizer, group: Mapping[str, Any]) -> None:
    decoupled = _is_decoupled(optimizer, group)
    kind = type(optimizer).__name__
    if decoupled is None:
        raise ValueError(
            f"group {group.get('name')!r} has a timescale, and whether {kind} decouples weight decay from the gradient "
            "could not be found out; give λ as a number"
        )
    if not decoupled:
        known = type(optimizer) in _COUPLED or "decoupled_weight_decay" in group
        why = (
            "it is coupled, so λ·w goes through the same moments as the gradient and"
            if known
            else "a step without a gradient does not multiply its weights by 1 - lr·λ, so"
        )
        raise ValueError(
            f"group {group.get('name')!r} has a timescale, which {kind} cannot have: {why} the weights are no running "
            "average with the time scale 1/(lr·λ); use a decoupled optimizer such as AdamW, or give λ as a number"
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
        # What is no option of a param group, such as `weight_decouple` of adabelief-pytorch (0.2).
        kept = {name: value for name, value in vars(optimizer).items() if isinstance(value, (bool, int, float, str))}
        vars(twin).update({name: value for name, value in kept.items() if name in vars(twin)})
        for _ in range(2):
            weight.grad = torch.zeros_like(weight)
            twin.step()
    except Exception:  # of whatever kind the optimizer of others raises
        return None
    return torch.allclose(weight, torch.full_like(weight, (1 - lr * decay) ** 2), rtol=1e-6)
