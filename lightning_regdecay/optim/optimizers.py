"""Decay groups in force for the whole life of an optimizer: when it is built, resumed, and given more parameters."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_regdecay.groups.groups import DecayGroups
from lightning_regdecay.optim.following import follow_schedules, scheduled_param_group
from lightning_regdecay.optim.resuming import WeightDecayFrom, carry_over_by_name
from lightning_regdecay.rules.names import hint, safe_name, unique_name
from lightning_regdecay.rules.rules import DecayRule
from lightning_regdecay.rules.schedules import STRENGTH_KEYS, DecaySchedule, schedule_of

_ADDED_KEY = "decay_added"
"""Where a param group that was added later notes which of its neighbours were added with it."""


def optimizers_in(config: Any) -> Iterator[Any]:
    """The optimizers in any of the forms that ``configure_optimizers`` may return."""
    if isinstance(config, Mapping):
        yield from optimizers_in(config.get("optimizer"))
    elif isinstance(config, (list, tuple)):
        for entry in config:
            yield from optimizers_in(entry)
    elif hasattr(config, "param_groups"):
        yield config


def lr_schedulers_in(config: Any) -> Iterator[Any]:
    """The lr schedulers in any of the forms that ``configure_optimizers`` may return."""
    if isinstance(config, Mapping):
        yield from lr_schedulers_in([config[key] for key in ("lr_scheduler", "scheduler") if key in config])
    elif isinstance(config, (list, tuple)):
        for entry in config:
            yield from lr_schedulers_in(entry)
    elif config is not None and not hasattr(config, "param_groups"):
        yield config


def keep_in_force(
    optimizer: Optimizer, lr_schedulers: Sequence[Any], module: Any, groups: DecayGroups, weight_decay: WeightDecayFrom
) -> None:
    """Let an optimizer over decay groups follow schedules, resume by name, and take more parameters by the rules.

    Args:
        optimizer: over the param groups of decay groups.
        lr_schedulers: those of the optimizer.
        module: the ``LightningModule``, with or without a Trainer.
        groups: the decay groups of the module.
        weight_decay: whose λ goes on in a resumed run.
    """
    reference = weakref.ref(module)

    def trainer() -> Any:
        return getattr(reference(), "_trainer", None)

    def follow() -> None:
        follow_schedules(optimizer, lambda: _run_length(trainer()))

    carry_over_by_name(
        optimizer,
        module,
        lambda: [*lr_schedulers, *_lr_schedulers_of(optimizer, trainer())],
        weight_decay,
        checkpoint=lambda: _sharded_checkpoint(trainer()),
        steps_done=lambda: int(trainer().global_step) if trainer() is not None else 0,
        before=_set_strengths_again(optimizer, groups),
    )
    # A checkpoint may bring schedules along.
    if weight_decay == "checkpoint" or any(schedule_of(group) for group in optimizer.param_groups):
        follow()
    _split_added_groups(optimizer, groups, follow)


def split_param_group(
    param_group: Mapping[str, Any], groups: DecayGroups, optimizer: Optimizer
) -> list[dict[str, Any]]:
    """A param group cut up by decay rules: the same options, but for those that the rules set.

    Args:
        param_group: as ``Optimizer.add_param_group`` takes it.
        groups: the decay groups of the model. Frozen parameters go by the rules too; what is not of the model keeps the
            options that it has.
        optimizer: that the param group is for.

    Raises:
        ValueError: for an optimizer without weight decay, or an option that it does not have.
    """
    params = param_group["params"]
    entries = [params] if isinstance(params, torch.Tensor) else list(params)
    by_parameter = groups.by_parameter
    members: dict[tuple[str | None, DecayRule | None], dict[torch.Tensor, str]] = {}
    for entry in entries:
        name, parameter = entry if isinstance(entry, tuple) else ("", entry)  # of named_parameters()
        place = by_parameter.get(parameter)
        key = (None, None) if place is None else (place.group, place.rule)
        members.setdefault(key, {})[parameter] = name if place is None else place.name
    taken = {str(group.get("name")) for group in optimizer.param_groups}
    parts = []
    for (group_name, rule), names in members.items():
        label = ".".join(str(part) for part in (param_group.get("name"), group_name) if part is not None)
        name = unique_name(safe_name(label) or "other", taken)
        taken.add(name)
        part = {**param_group, "params": list(names), "param_names": list(names.values()), "name": name}
        parts.append({**part, **_options(rule, part, optimizer)})
    return parts or [dict(param_group)]


def check_options(name: str, rule: DecayRule, optimizer: Optimizer) -> None:
    """Raise where a rule needs what an optimizer does not have."""
    kind = type(optimizer).__name__
    strength = rule.weight_decay if rule.decay_mult is None else rule.decay_mult
    if "weight_decay" not in optimizer.defaults and strength != 0:
        raise ValueError(NO_WEIGHT_DECAY.format(optimizer=kind))
    for option in rule.options:
        if option not in optimizer.defaults:
            raise ValueError(
                f"group {name!r} has the option {option!r}, which {kind} does not know; "
                f"{hint(option, optimizer.defaults)}"
            )


def multiple(name: str, rule: DecayRule, own: float, optimizer: Optimizer) -> float:
    """The λ of a rule with ``decay_mult``."""
    assert rule.decay_mult is not None
    if own == 0 and rule.decay_mult != 0:
        rank_zero_warn(
            f"group {name!r} has decay_mult={rule.decay_mult:g}, a factor on the weight decay of "
            f"{type(optimizer).__name__}, which is 0: nothing decays; give the optimizer a weight_decay"
        )
    return rule.decay_mult * own


NO_WEIGHT_DECAY = "{optimizer} knows no weight decay, so decay rules cannot work with it; use one such as AdamW or SGD"


def _options(rule: DecayRule | None, param_group: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """The options that a rule sets in a param group."""
    if rule is None:
        return {}
    check_options(param_group["name"], rule, optimizer)
    strength = _strength(rule, param_group, optimizer) if "weight_decay" in optimizer.defaults else {}
    return {**strength, **rule.options}


def _strength(rule: DecayRule, param_group: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """What a param group holds for the λ of a rule."""
    if isinstance(rule.weight_decay, DecaySchedule):
        return scheduled_param_group(rule.weight_decay)
    own = param_group.get("weight_decay", optimizer.defaults["weight_decay"])
    name = param_group["name"]
    return {"weight_decay": rule.weight_decay if rule.decay_mult is None else multiple(name, rule, own, optimizer)}


def _set_strengths_again(optimizer: Optimizer, groups: DecayGroups) -> Callable[[], None]:
    """What sets the λ of the rules again in param groups that took the place of those of today.

    Lightning's ``BaseFinetuning`` (2.6) puts the groups of a checkpoint into the optimizer, with their λ, before the
    state is loaded.
    """
    built = optimizer.param_groups

    def set_again() -> None:
        if optimizer.param_groups is built:
            return
        if any(_ADDED_KEY in param_group for param_group in optimizer.param_groups):
            _keep_lr_together(optimizer)
        places = groups.by_parameter
        for param_group in optimizer.param_groups:
            rules = {places[p].rule for p in param_group["params"] if p in places}
            rule = rules.pop() if len(rules) == 1 else None
            if rule is not None and rule.weight_decay is not None and "weight_decay" in optimizer.defaults:
                for key in STRENGTH_KEYS:
                    param_group.pop(key, None)
                param_group.update(_strength(rule, param_group, optimizer))

    return set_again


def _split_added_groups(optimizer: Optimizer, groups: DecayGroups, follow: Callable[[], None]) -> None:
    """Let param groups that are added later, as Lightning's finetuning callbacks do, go by the rules too."""
    add_param_group = optimizer.add_param_group

    def add(param_group: dict[str, Any]) -> None:
        parts = split_param_group(param_group, groups, optimizer)
        if len(parts) > 1:
            together = 1 + max((group.get(_ADDED_KEY, 0) for group in optimizer.param_groups), default=0)
            parts = [{**part, _ADDED_KEY: together} for part in parts]
            _keep_lr_together(optimizer)
        for part in parts:
            add_param_group(part)
        if any(map(schedule_of, parts)):
            follow()

    optimizer.add_param_group = add  # type: ignore[method-assign]


def _keep_lr_together(optimizer: Optimizer) -> None:
    """From now on, give the parts of a group that was added later one lr at every step.

    Whoever added it, such as Lightning's ``BackboneFinetuning`` (2.6), steers ``param_groups[-1]``, the last of them.
    """

    def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        last = {group[_ADDED_KEY]: group for group in optimizer.param_groups if _ADDED_KEY in group}
        for group in optimizer.param_groups:
            if _ADDED_KEY in group:
                group["lr"] = last[group[_ADDED_KEY]]["lr"]

    if optimizer not in _kept_together:
        _kept_together.add(optimizer)
        optimizer.register_step_pre_hook(before_step)


_kept_together: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def _lr_schedulers_of(optimizer: Optimizer, trainer: Any) -> list[Any]:
    """The lr schedulers that a Trainer has for an optimizer: also those that a subclass made."""
    if trainer is None:
        return []
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    return [scheduler for scheduler in schedulers if getattr(scheduler, "optimizer", None) is optimizer]


def _sharded_checkpoint(trainer: Any) -> Any:
    """The checkpoint that the strategy is loading by itself into sharded parameters."""
    if trainer is None or trainer.strategy.lightning_restore_optimizer:
        return None
    return trainer.ckpt_path if any(hasattr(p, "device_mesh") for p in trainer.model.parameters()) else None


def _run_length(trainer: Any) -> dict[str, float]:
    """The optimizer steps of the run and of an epoch, as far as they are known.

    To be called when the training has started: earlier it would make the data loaders, which Lightning (2.6) then does
    not give the state that they had in the checkpoint.
    """
    # Only Fabric, or the user, knows how long the run will be, or how many steps are taken by hand, or in each epoch.
    if trainer is None or not trainer.lightning_module.automatic_optimization:
        return {}
    if any(len(set(getattr(c, "scheduling", {0: 1}).values())) > 1 for c in trainer.callbacks):
        return {}  # of GradientAccumulationScheduler
    batches = trainer.num_training_batches
    steps_per_epoch = batches if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)
    lengths = {"total_steps": trainer.estimated_stepping_batches, "steps_per_epoch": steps_per_epoch}
    return {name: length for name, length in lengths.items() if 0 < length < math.inf}
