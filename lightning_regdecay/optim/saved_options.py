"""Options of param groups, those of a checkpoint beside those of today, and what the user is told of them."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_regdecay.groups.matching import listed
from lightning_regdecay.optim.saved_states import IDENTITY_KEYS, SavedState
from lightning_regdecay.optim.strengths import as_number
from lightning_regdecay.optim.unnamed import same
from lightning_regdecay.rules.schedules import PEAK_KEY, STEP_KEY, STRENGTH_KEYS, strength_of, strength_text

SCHEDULER_KEYS = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}
"""What torch's lr schedulers write into param groups."""


FLAGS = {"foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay"}
"""Options that came to torch's optimizers over time, so that checkpoints of older versions lack them."""


NOT_CARRIED = IDENTITY_KEYS | STRENGTH_KEYS | {PEAK_KEY, "decay_added"}
"""What is not taken from a checkpoint, or not as an option: ``decay_added`` is of version 0.1."""


_MOST_NAMED = 8  # parameters in a message


def check_same_optimizer(optimizer: Optimizer, saved_groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise for the state of another kind of optimizer, as far as the options in its param groups tell."""
    ours = set(optimizer.defaults) - FLAGS - NOT_CARRIED
    users = {key for group in optimizer.param_groups for key in group} - set(optimizer.defaults)
    for group in saved_groups:
        theirs = set(group) - FLAGS - NOT_CARRIED - SCHEDULER_KEYS - users
        # A group may have keys of the user's own; those of other optimizers tell.
        more, less = (theirs - ours) & _options_of_torch(), ours - theirs
        decoupled, today = (g.get("decoupled_weight_decay") for g in (group, optimizer.defaults))
        if more or less or (decoupled is not None and today is not None and decoupled != today):
            has = [f"it has the options {listed(sorted(more))}"] if more else []
            lacks = [f"it lacks {listed(sorted(less))}"] if less else []
            other = [f"its decoupled_weight_decay is {decoupled}"] if not has + lacks else []
            raise ValueError(
                f"the optimizer state in the checkpoint is not that of {type(optimizer).__name__}: "
                f"{' and '.join(has + lacks + other)}; resume with the optimizer that it is of, or start the run from "
                "the weights alone"
            )


@functools.cache
def _options_of_torch() -> frozenset[str]:
    """The names of all options of torch's optimizers."""
    kinds = [kind for kind in vars(torch.optim).values() if isinstance(kind, type) and issubclass(kind, Optimizer)]
    return frozenset(name for kind in kinds for name in inspect.signature(kind).parameters)


def lr_of_a_new_group(group: Mapping[str, Any], saved_groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The lr of a group of new parameters only: its own, as far through the lr schedule as that of the others."""
    factors = [
        as_number(other["lr"]) / float(other["initial_lr"])
        for other in saved_groups
        if "lr" in other and other.get("initial_lr")
    ]
    if not factors or "initial_lr" not in group or isinstance(group["lr"], torch.Tensor):
        return {}
    if not math.isclose(min(factors), max(factors), rel_tol=1e-9):
        rank_zero_warn(
            f"group {group.get('name', '')!r} has new parameters only, and begins with the lr {group['lr']:g}: the "
            "groups in the checkpoint have not all come equally far in the lr schedule"
        )
        return {}
    return {"lr": group["initial_lr"] * factors[0]}


def changes(
    group: Mapping[str, Any], before: Sequence[Mapping[str, Any]], today: Mapping[str, Any], goes_on: Mapping[str, Any]
) -> list[str]:
    """What the user is told of a param group that goes on with other values than it had, or than are configured."""
    label = f"group {group.get('name', '')!r}"
    remarks = []
    if any(strength_of(other) != strength_of(goes_on) for other in before):
        was = " and ".join(dict.fromkeys(map(strength_text, before)))
        remarks.append(f"weight decay of {label}: {was} (checkpoint) → {strength_text(goes_on)} (rules)")
    cycled = {"betas", "momentum"} if "max_momentum" in before[0] else set()
    for key in sorted(today.keys() - NOT_CARRIED - SCHEDULER_KEYS - FLAGS - cycled - {"lr"}):
        if key in before[0] and not same(before[0][key], today[key]):
            remarks.append(f"{key} of {label}: {before[0][key]} (checkpoint) goes on, {today[key]} is configured")
    lr, configured = (as_number(g.get("initial_lr", g.get("lr"))) for g in (before[0], today))
    if lr != configured:
        remarks.append(f"lr of {label}: {lr:g} (checkpoint) goes on, {configured:g} is configured")
    return remarks


def steps_in(saved: SavedState) -> int | None:
    """The optimizer steps that a checkpoint tells of, None where it tells of none."""
    counted = [int(group[STEP_KEY]) for group in saved.groups if STEP_KEY in group]
    own = [state["step"] for state in saved.state.values() if isinstance(state, Mapping) and "step" in state]
    return max(counted or map(int, own), default=None)


def warn_of_the_rest(names: set[str], saved: SavedState) -> None:
    """Name the parameters that the checkpoint has no state of, and those whose state is not used."""
    missing = [name for name in names if name not in saved.group_of]
    unused = [name for name in saved.group_of if name not in names and saved.state.get(saved.key_of.get(name))]
    tied = saved.keys - set(saved.key_of.values())
    if any(saved.state.get(key) for key in tied):
        rank_zero_warn(
            f"the checkpoint has optimizer states of {len(tied)} parameters that are tied to others now: those of the "
            "first names go on"
        )
    if missing:
        rank_zero_warn(
            f"the checkpoint has no optimizer state of {named(missing)}: new, or frozen when it was saved; they start "
            "without"
        )
    if unused:
        rank_zero_warn(
            f"the checkpoint has optimizer state of {named(unused)} that is not used: gone from the model, or frozen "
            "now"
        )


def named(names: Collection[str]) -> str:
    """The first of many names, for messages."""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return listed(sorted(names)[:_MOST_NAMED]) + more
