"""Resuming: the optimizer state of a checkpoint onto the param groups of today, by parameter name."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_regdecay.groups.parameters import ModelParameter, model_parameters
from lightning_regdecay.optim.holders import check_is_optimizer, unwrapped, with_held
from lightning_regdecay.optim.lr_schedulers import CarriedGroups, carry_lr_scheduler, set_on_instance, with_inner
from lightning_regdecay.optim.saved_options import (
    NOT_CARRIED,
    changes,
    check_same_optimizer,
    lr_of_a_new_group,
    named,
    steps_in,
    warn_of_the_rest,
)
from lightning_regdecay.optim.saved_states import (
    SavedState,
    check_names,
    first_names,
    groups_in_file,
    groups_in_folder,
    names_in,
    read_state,
    saved_names,
    with_names_outside,
)
from lightning_regdecay.optim.strengths import TELLS_NO_STEPS
from lightning_regdecay.optim.unnamed import fits, same, shaped
from lightning_regdecay.rules.schedules import PEAK_KEY, STEP_KEY, strength_of

_carriers: weakref.WeakKeyDictionary[Any, weakref.ref[_Carrier]] = weakref.WeakKeyDictionary()
"""Kept by the hooks of each optimizer."""


def resume_by_name(
    optimizer: Optimizer, model: nn.Module, *, lr_scheduler: Any = None, checkpoint: str | Path | None = None
) -> None:
    """Let ``optimizer.load_state_dict`` give every parameter its own state, also where the groups have changed.

    The mixin does it by itself. Elsewhere (Fabric, plain PyTorch) call it once, before the state is loaded, for an
    optimizer that you built over decay groups. By name, every parameter keeps its state (momentum, second moment,
    step), its lr and the other options of its group, and its place in the lr scheduler; λ is that of the rules. What
    the checkpoint does not have, and what of it is not used, is named in a warning. Checkpoints without parameter names
    are read in the order of ``model.parameters()``.

    Args:
        optimizer: over ``group.as_param_group()`` of decay groups, or with ``param_names`` in each param group.
        model: the model that the groups were built over.
        lr_scheduler: of torch, or another; of one that is not torch's the state is loaded as it is. One, or a list.
        checkpoint: the folder that the state will be loaded from, where ``torch.distributed.checkpoint`` loads it (its
            ``get_optimizer_state_dict``, ``load`` and ``set_optimizer_state_dict``, as for sharded parameters).

    Raises:
        TypeError: for what is no optimizer, model or lr scheduler, and an optimizer that takes no hooks.
        ValueError: later, when a state is loaded and before anything is changed, for a state that cannot be carried
            over: that of another optimizer, one without names that fits the model in no way or in several, or one where
            a group joins parameters that had different options.

    >>> net = nn.Linear(2, 1)
    >>> before = torch.optim.AdamW(net.parameters(), weight_decay=0.1)
    >>> groups = [
    ...     {"params": [net.bias], "param_names": ["bias"], "weight_decay": 0.0},
    ...     {"params": [net.weight], "param_names": ["weight"], "weight_decay": 0.5},
    ... ]
    >>> today = torch.optim.AdamW(groups)
    >>> resume_by_name(today, net)
    >>> today.load_state_dict(before.state_dict())
    >>> [group["weight_decay"] for group in today.param_groups]
    [0.0, 0.5]
    """
    check_is_optimizer(optimizer)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    optimizer = unwrapped(optimizer)
    every = lr_scheduler if isinstance(lr_scheduler, (list, tuple)) else [lr_scheduler]
    before = [scheduler for carrier in _carriers_of(optimizer) for scheduler in carrier.lr_schedulers()]
    for scheduler in every:
        if scheduler is not None and not callable(getattr(scheduler, "load_state_dict", None)):
            kind = type(scheduler).__name__
            raise TypeError(f"lr_scheduler must be an lr scheduler, or a list of them, got an object of type {kind}")
    given = [weakref.ref(scheduler) for scheduler in [*before, *every] if scheduler is not None]
    carry_over_by_name(optimizer, model, lambda: [ref() for ref in given], lambda: checkpoint, lambda: 0)


def carry_over_by_name(
    optimizer: Any,
    model: nn.Module,
    lr_schedulers: Callable[[], Iterable[Any]],
    checkpoint: Callable[[], str | Path | None],
    steps_done: Callable[[], int],
) -> None:
    """As :func:`resume_by_name`, for a caller that will know more.

    Args:
        optimizer: as there.
        model: as there.
        lr_schedulers: tells which lr schedulers the optimizer has, now and when a state is loaded.
        checkpoint: tells where the checkpoint lies that is being loaded, where that is needed.
        steps_done: tells how many optimizer steps the run has done.
    """
    target = next((one for one in with_held(optimizer) if hasattr(one, "_optimizer_load_state_dict_pre_hooks")), None)
    if target is None:  # as pytorch-optimizer's (4.1) Lookahead, which has one inside
        raise TypeError(
            f"{type(optimizer).__name__} does not call torch.optim.Optimizer.__init__, so it takes no hooks when a "
            "state is loaded and cannot be resumed by parameter name; use the optimizer inside it, or another"
        )
    stop_carrying(target)
    carrier = _Carrier(target, optimizer, model, lr_schedulers, checkpoint, steps_done)
    _carriers[target] = weakref.ref(carrier)
    carrier.hang_on()


def stop_carrying(optimizer: Any) -> None:
    """Let an optimizer, and its lr schedulers, load states as torch's do."""
    for carrier in _carriers_of(optimizer):
        carrier.let_go()
    for one in with_held(optimizer):
        _carriers.pop(one, None)


def _carriers_of(optimizer: Any) -> list[_Carrier]:
    references = [_carriers.get(one) for one in with_held(optimizer)]
    return [carrier for reference in references if reference is not None and (carrier := reference()) is not None]


class _Carrier:
    """Translates the states of one optimizer, and of its lr schedulers, when they are loaded."""

    def __init__(
        self,
        optimizer: Any,
        root: Any,
        model: nn.Module,
        lr_schedulers: Callable[[], Iterable[Any]],
        checkpoint: Callable[[], str | Path | None],
        steps_done: Callable[[], int],
    ) -> None:
        self._optimizer, self._root = weakref.ref(optimizer), weakref.ref(root)
        self._model = weakref.ref(model)  # which may hold the optimizer
        self.lr_schedulers = lr_schedulers
        self._checkpoint = checkpoint
        self._steps_done = steps_done
        self._carried = CarriedGroups()
        self._handles: list[Any] = []
        self._undo: list[Callable[[], None]] = []
        self._is_translated = False

    def hang_on(self) -> None:
        """Hang onto the optimizer and its lr schedulers."""
        optimizer: Any = self._optimizer()
        self._handles = [
            optimizer.register_load_state_dict_pre_hook(self.before_loading),
            optimizer.register_state_dict_post_hook(self.after_saving),
        ]
        if type(optimizer).load_state_dict is not Optimizer.load_state_dict:
            # bitsandbytes (0.50) runs no hooks there, and pytorch-optimizer (4.1) goes back to the state before them.
            self._undo.append(
                set_on_instance(optimizer, "load_state_dict", functools.partial(_load, self._optimizer, self))
            )
        self._carry_lr_schedulers()

    def let_go(self) -> None:
        """Leave them as they were."""
        for handle in self._handles:
            handle.remove()
        for undo in self._undo:
            undo()

    def _carry_lr_schedulers(self) -> None:
        for scheduler in with_inner(self.lr_schedulers()):
            if isinstance(scheduler, LRScheduler) and "load_state_dict" not in vars(scheduler):
                self._undo += carry_lr_scheduler(scheduler, self._carried)

    def load(self, optimizer: Optimizer, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Load a state by a ``load_state_dict`` of the optimizer's own, which gets to see the translated one only."""
        translated = self.before_loading(optimizer, state_dict)
        self._is_translated = True
        try:
            type(optimizer).load_state_dict(optimizer, translated, *args, **kwargs)
        finally:
            self._is_translated = False

    def before_loading(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state that torch can load: with the param groups of today, each with its own parameters."""
        if self._is_translated:
            return state_dict
        self._carry_lr_schedulers()
        known = self._known()
        names = _names_of(optimizer, known)
        saved = read_state(state_dict, self._groups_beside(names, known), known)
        check_same_optimizer(optimizer, saved.groups)
        sources = [self._sources(group, own, saved) for group, own in zip(optimizer.param_groups, names)]
        steps = steps_in(saved)
        if steps is None:
            steps = self._steps_done()
            if steps == 0 and any(STEP_KEY in group for group in optimizer.param_groups):
                rank_zero_warn(TELLS_NO_STEPS)

        remarks: list[str] = []
        groups = []
        numbers = itertools.count()
        state = {key: value for key, value in saved.state.items() if key not in saved.keys}
        for group, own, numbers_before in zip(optimizer.param_groups, names, sources):
            before = [saved.groups[number] for number in numbers_before]
            groups.append({**self._options(group, before, saved, steps, remarks), "params": []})
            for name, parameter, number in zip(own, group["params"], numbers):
                groups[-1]["params"].append(number)
                key = saved.key_of.get(name)
                if key in saved.state:
                    state[number] = _checked_state(name, parameter, saved.state[key])

        self._check_states_around(optimizer, groups, names, saved)
        self._carried.take([own[0] if own else None for own in sources], len(saved.groups))
        self._checkpoint = lambda: None  # what is saved from now on is this run
        for remark in remarks:
            rank_zero_info(remark)
        warn_of_the_rest({name for own in names for name in own}, saved)
        return {**state_dict, "state": state, "param_groups": groups}

    def _check_states_around(
        self, optimizer: Any, groups: list[dict[str, Any]], names: list[list[str]], saved: SavedState
    ) -> None:
        """Raise where an optimizer around this one numbers the parameters itself, and the numbers have changed."""
        root = self._root()
        if root is None or root is optimizer or getattr(root, "state", optimizer.state) is optimizer.state:
            return
        keys = [saved.key_of.get(name) for own in names for name in own]
        if keys != [number for group in groups for number in group["params"]]:
            raise ValueError(
                f"{type(root).__name__} keeps a state beside that of its {type(optimizer).__name__}, by the numbers of "
                "the parameters, which are others in the checkpoint: resume with groups of the same parameters in the "
                "same order, or start the run from the weights alone"
            )

    def after_saving(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Show the parameters in the groups of the checkpoint, while ``torch.distributed.checkpoint`` is loading it.

        It (2.6 and later) loads what the state of today has places for: else it would pass over groups that are
        no more, and fail for those that are new.
        """
        if self._checkpoint() is None:
            return
        known = self._known()
        names = _names_of(optimizer, known)
        groups = self._groups_beside(names, known)
        # In a file the parameters have numbers, and torch finds the groups itself.
        if groups is None or not all(isinstance(key, str) for group in groups for key in group["params"]):
            return
        places = {name: number for number, name in enumerate(name for own in names for name in own)}
        for group, own in zip(groups, first_names([group["params"] for group in groups], known)):
            group["params"] = [places.pop(name) for name in own if name in places]
        if places:
            raise ValueError(
                f"the checkpoint has no optimizer state of {named(places)} (new, or frozen when it was saved). "
                "torch.distributed.checkpoint restores all parameters or none: train the same ones, or start the run "
                "from the weights alone"
            )
        state_dict["param_groups"] = groups

    def _known(self) -> list[ModelParameter]:
        model = self._model()
        return [] if model is None else model_parameters(model)

    def _groups_beside(
        self, names: Sequence[Sequence[str]], known: Sequence[ModelParameter]
    ) -> list[dict[str, Any]] | None:
        """The param groups of the checkpoint, where ``torch.distributed.checkpoint`` is loading it.

        It does not hand them over: it gives today's groups the options of those that held one of their parameters, the
        last one wins.
        """
        path = self._checkpoint()
        if path is None:
            return None
        optimizers = groups_in_folder(Path(path)) if Path(path).is_dir() else groups_in_file(Path(path))
        if not optimizers:
            return None
        own = {name for group in names for name in group}

        def shared(groups: list[dict[str, Any]]) -> int:
            return sum(name in own for group in saved_names(groups, {"state": {}}, known) for name in group)

        return optimizers[0] if len(optimizers) == 1 else max(optimizers, key=shared)

    def _sources(self, group: Mapping[str, Any], names: Sequence[str], saved: SavedState) -> list[int]:
        """The numbers of the groups in the checkpoint that a param group goes on from.

        Raises:
            ValueError: where they have different options, of which it can have only one.
        """
        found: dict[int, str] = {}
        for name in names:
            if name in saved.group_of:
                found.setdefault(saved.group_of[name], name)
        first, *others = found or [0]
        for number in others:
            one, other = saved.groups[first], saved.groups[number]
            for key in sorted((one.keys() | other.keys()) - NOT_CARRIED):
                if not same(one.get(key), other.get(key)):
                    raise ValueError(
                        f"group {group.get('name', '')!r} joins parameters whose {key} differs in the checkpoint: "
                        f"{one.get(key)!r} of {found[first]!r} and {other.get(key)!r} of {found[number]!r}; a param "
                        "group has one of each option, so keep them apart with a rule for each"
                    )
        return list(found)

    def _options(
        self, group: Mapping[str, Any], before: list[dict[str, Any]], saved: SavedState, steps: int, remarks: list[str]
    ) -> dict[str, Any]:
        """The options with which a param group goes on: those of the checkpoint, but for what is today's."""
        today = {key: value for key, value in group.items() if key != "params"}
        if STEP_KEY in today:
            today[STEP_KEY] = steps
            if before and strength_of(before[0]) == strength_of(today):
                today["weight_decay"] = before[0]["weight_decay"]  # until the next step sets it
        if not before:
            return {**today, **lr_of_a_new_group(group, saved.groups)}
        options = {**today, **{key: value for key, value in before[0].items() if key not in NOT_CARRIED}}
        if PEAK_KEY in today:
            options[PEAK_KEY] = before[0].get(PEAK_KEY, today[PEAK_KEY])
        remarks += changes(group, before, today, options)
        return options


def _load(
    optimizer: weakref.ref[Any], carrier: _Carrier, state_dict: dict[str, Any], *args: Any, **kwargs: Any
) -> None:
    carrier.load(optimizer(), state_dict, *args, **kwargs)  # type: ignore[arg-type]


def _checked_state(name: str, parameter: torch.Tensor, state: Any) -> Any:
    if isinstance(state, Mapping) and not fits(state, parameter):
        shapes = " and ".join(sorted({str(tuple(tensor.shape)) for tensor in shaped(state)}))
        raise ValueError(
            f"the optimizer state of {name!r} in the checkpoint has the shape {shapes}, the parameter "
            f"{tuple(parameter.shape)}: it cannot go on; start the run from the weights alone"
        )
    return state


def _names_of(optimizer: Optimizer, known: Sequence[ModelParameter]) -> list[list[str]]:
    """The names of the parameters of each param group of today.

    Raises:
        ValueError: for two parameters of one name, and for one in whose place the model has another by now.
    """
    of_model = {id(parameter.parameter): parameter.name for parameter in known}
    every = {name for parameter in known for name in parameter.names}
    names = []
    for group in optimizer.param_groups:
        given = names_in(group) or [""] * len(group["params"])
        own = [of_model.get(id(parameter), name) for parameter, name in zip(group["params"], given)]
        for parameter, name in zip(group["params"], own):
            if name in every and id(parameter) not in of_model:
                raise ValueError(
                    f"the {type(optimizer).__name__} holds a parameter {name!r} that is not the model's of this name: "
                    "the model has got another in its place since, or it is of another model; build the optimizer over "
                    "one module, after that has its parameters"
                )
        names.append(own)
    check_names((name for own in names for name in own), f"the {type(optimizer).__name__}")
    return with_names_outside(names)
