"""Resuming: the optimizer state of a checkpoint onto the param groups of today, by parameter name."""

from __future__ import annotations

import itertools
import pickle
import re
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_regdecay.matching import listed
from lightning_regdecay.parameters import ModelParameter, model_parameters, plain_name
from lightning_regdecay.schedules import STEP_KEY, STRENGTH_KEYS, strength_text

WeightDecayFrom = Literal["rules", "checkpoint"]

_IDENTITY_KEYS = {"params", "param_names", "name"}
"""What a param group is, beside how it is trained."""
_SCHEDULER_KEYS = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}
"""What torch's lr schedulers write into param groups."""
_FLAGS = {"foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay"}
"""Options that came to torch's optimizers over time, so that checkpoints of older versions lack them."""
_PER_GROUP = re.compile(r"(lr|lrs|momentums|lambdas)$")
"""Names of the lists of an lr scheduler that have an entry per param group."""
_MOST_NAMED = 8  # parameters in a message
_MOST_WAYS = 10_000  # to put groups without names together


def resume_by_name(
    optimizer: Optimizer,
    model: nn.Module,
    *,
    lr_scheduler: Any = None,
    weight_decay: WeightDecayFrom = "rules",
    checkpoint: str | Path | None = None,
) -> None:
    """Let ``optimizer.load_state_dict`` give every parameter its own state, also where the groups have changed.

    The mixin does it by itself. Elsewhere (Fabric, plain PyTorch) call it once, before the state is loaded. By name,
    every parameter keeps its state (momentum, second moment, step), its lr and the other options of its group, and its
    place in the lr scheduler. What the checkpoint does not have, and what of it is not used, is named in a warning.
    Checkpoints without parameter names are read in the order of ``model.parameters()``.

    Args:
        optimizer: over ``group.as_param_group()`` of decay groups, or with ``param_names`` in each param group.
        model: the model that the groups were built over.
        lr_scheduler: of torch, or another with such lists of an entry per group; load its state after the optimizer's.
        weight_decay: whose λ goes on where they differ: that of the rules, or that of the checkpoint.
        checkpoint: the folder that the state will be loaded from, where ``torch.distributed.checkpoint`` loads it (its
            ``get_optimizer_state_dict``, ``load`` and ``set_optimizer_state_dict``, as for sharded parameters).

    Raises:
        ValueError: for another ``weight_decay``; later, when a state is loaded and before anything is changed, for a
            state that cannot be carried over: that of another optimizer, one without names that fits the model in no
            way or in several, or one where a group joins parameters that had different options.

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
    lr_schedulers = [] if lr_scheduler is None else [lr_scheduler]
    carry_over_by_name(optimizer, model, lr_schedulers, weight_decay, lambda: checkpoint)


def carry_over_by_name(
    optimizer: Optimizer,
    model: nn.Module,
    lr_schedulers: Sequence[Any],
    weight_decay: WeightDecayFrom,
    checkpoint: Callable[[], str | Path | None],
    steps_done: Callable[[], int] = lambda: 0,
    before: Callable[[], None] = lambda: None,
) -> None:
    """As :func:`resume_by_name`, for a caller that will know more.

    Args:
        optimizer: as there.
        model: as there.
        lr_schedulers: as there, several.
        weight_decay: as there.
        checkpoint: tells where the checkpoint lies that is being loaded, where that is needed.
        steps_done: tells how many optimizer steps the run has done.
        before: is called when a state is about to be loaded.
    """
    if weight_decay not in ("rules", "checkpoint"):
        raise ValueError(
            "the weight decay that goes on in a resumed run is that of the 'rules' or of the 'checkpoint', got "
            f"{weight_decay!r}"
        )
    carrier = _Carrier(model, weight_decay, checkpoint, steps_done, before)
    optimizer.register_load_state_dict_pre_hook(carrier.before_loading)
    optimizer.register_state_dict_post_hook(carrier.after_saving)
    for scheduler in lr_schedulers:
        if hasattr(scheduler, "load_state_dict"):
            _carry_scheduler(scheduler, optimizer, carrier)


class _Saved(NamedTuple):
    """What a checkpoint holds of an optimizer, by parameter name."""

    groups: list[dict[str, Any]]
    """Its param groups."""
    group_of: dict[str, int]
    """Parameter name to the number of its group."""
    key_of: dict[str, Any]
    """Parameter name to its key in the state."""
    state: dict[Any, Any]


class _Carrier:
    """Translates the states of one optimizer, and of its lr scheduler, when they are loaded."""

    def __init__(
        self,
        model: nn.Module,
        weight_decay: WeightDecayFrom,
        checkpoint: Callable[[], str | Path | None],
        steps_done: Callable[[], int],
        before: Callable[[], None],
    ) -> None:
        self._before = before
        self._model = weakref.ref(model)  # which may hold the optimizer
        self._checkpoint = checkpoint
        self._steps_done = steps_done
        # The options that are not taken from the checkpoint.
        self._todays = _IDENTITY_KEYS if weight_decay == "checkpoint" else _IDENTITY_KEYS | STRENGTH_KEYS
        self.sources: list[int | None] | None = None
        """For every param group of today, the number of the one in the checkpoint that it goes on from."""
        self.saved_count = 0
        """How many param groups the checkpoint has."""

    def before_loading(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state that torch can load: with the param groups of today, each with its own parameters."""
        self._before()
        known = self._known()
        names = _names_of(optimizer, known)
        saved = _read(state_dict, self._groups_beside(names, known), known)
        _check_same_optimizer(optimizer, saved.groups)
        sources = [self._sources(group, own, saved) for group, own in zip(optimizer.param_groups, names)]
        steps = _steps_in(saved) or self._steps_done()

        remarks: list[str] = []
        groups = []
        numbers = itertools.count()
        of_parameters = set(saved.key_of.values())
        state = {key: value for key, value in saved.state.items() if key not in of_parameters}
        for group, own, numbers_before in zip(optimizer.param_groups, names, sources):
            before = [saved.groups[number] for number in numbers_before]
            groups.append({**self._options(group, before, saved, steps, remarks), "params": []})
            for name, parameter, number in zip(own, group["params"], numbers):
                groups[-1]["params"].append(number)
                key = saved.key_of.get(name)
                if key in saved.state:
                    state[number] = _checked_state(name, parameter, saved.state[key])

        self.sources = [own[0] if own else None for own in sources]
        self.saved_count = len(saved.groups)
        self._checkpoint = lambda: None  # what is saved from now on is this run
        for remark in remarks:
            rank_zero_info(remark)
        _warn_of_the_rest({name for own in names for name in own}, saved)
        return {**state_dict, "state": state, "param_groups": groups}

    def after_saving(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Show the parameters in the groups of the checkpoint, while ``torch.distributed.checkpoint`` is loading it.

        It (2.6 and later) loads what the state of today has places for: else it would pass over groups that are
        no more, and fail for those that are new.
        """
        known = self._known()
        names = _names_of(optimizer, known)
        groups = self._groups_beside(names, known)
        if groups is None or not isinstance(groups[0]["params"][0], str):
            return
        places = {name: number for number, name in enumerate(name for own in names for name in own)}
        for group, own in zip(groups, _first_names([group["params"] for group in groups], known)):
            group["params"] = [places.pop(name) for name in own if name in places]
        if places:
            raise ValueError(
                f"the checkpoint has no optimizer state of {_named(places)} (new, or frozen when it was saved). "
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
        optimizers = _groups_in_folder(Path(path)) if Path(path).is_dir() else _groups_in_file(Path(path))
        own = {name for group in names for name in group}

        def shared(groups: list[dict[str, Any]]) -> int:
            saved = _first_names(_saved_names({"param_groups": groups, "state": {}}, known), known)
            return sum(name in own for group in saved for name in group)

        return optimizers[0] if len(optimizers) == 1 else max(optimizers, key=shared)

    def _sources(self, group: Mapping[str, Any], names: Sequence[str], saved: _Saved) -> list[int]:
        """The numbers of the groups in the checkpoint that a param group goes on from.

        Raises:
            ValueError: where they have different options, of which it can have only one.
        """
        found: dict[int, str] = {}
        for name in names:
            if name in saved.group_of:
                found.setdefault(saved.group_of[name], name)
        for first, number in zip(list(found)[:1] * len(found), found):
            one, other = saved.groups[first], saved.groups[number]
            for key in sorted((one.keys() | other.keys()) - self._todays):
                if not _same(one.get(key), other.get(key)):
                    raise ValueError(
                        f"group {group.get('name', '')!r} joins parameters whose {key} differs in the checkpoint: "
                        f"{one.get(key)!r} of {found[first]!r} and {other.get(key)!r} of {found[number]!r}; a param "
                        "group has one of each option, so keep them apart with a rule for each"
                    )
        return list(found)

    def _options(
        self, group: Mapping[str, Any], before: list[dict[str, Any]], saved: _Saved, steps: int, remarks: list[str]
    ) -> dict[str, Any]:
        """The options with which a param group goes on: those of the checkpoint, but for what is today's."""
        today = {key: value for key, value in group.items() if key != "params"}
        if STEP_KEY in today:
            today[STEP_KEY] = steps
        if not before:
            return {**today, **_lr_of_a_new_group(group, saved.groups)}
        options = {**today, **{key: value for key, value in before[0].items() if key not in self._todays}}
        if "weight_decay" not in self._todays:
            options = {key: value for key, value in options.items() if key not in STRENGTH_KEYS or key in before[0]}
        label = f"group {group.get('name', '')!r}"
        was = " and ".join(dict.fromkeys(map(strength_text, before)))
        rules, goes_on = strength_text(today), strength_text(options)
        if was != goes_on:
            remarks.append(f"weight decay of {label}: {was} (checkpoint) → {goes_on} (rules)")
        elif rules != goes_on:
            remarks.append(f"weight decay of {label}: {goes_on} (checkpoint) goes on, the rules say {rules}")
        lr, configured = (float(g.get("initial_lr", g.get("lr", 0.0))) for g in (before[0], today))
        if lr != configured:
            remarks.append(f"lr of {label}: {lr:g} (checkpoint) goes on, {configured:g} is configured")
        return options


def _read(
    state_dict: Mapping[str, Any], groups: list[dict[str, Any]] | None, known: Sequence[ModelParameter]
) -> _Saved:
    """A state of an optimizer by parameter name; with its groups, where the state has them no more."""
    names = _first_names(_saved_names(state_dict, known), known)
    pairs = zip(state_dict["param_groups"], names)
    key_of = {name: key for group, own in pairs for name, key in zip(own, group["params"])}
    if groups is None:
        groups = state_dict["param_groups"]
    else:
        names = _first_names(_saved_names({"param_groups": groups, "state": {}}, known), known)
    group_of = {name: number for number, own in enumerate(names) for name in own}
    return _Saved(groups, group_of, key_of, dict(state_dict["state"]))


def _first_names(names: Iterable[Iterable[str]], known: Sequence[ModelParameter]) -> list[list[str]]:
    """The names of the parameters of each group without wrappers; of a tied parameter the first."""
    first = {name: parameter.name for parameter in known for name in parameter.names}
    return [[first.get(name, name) for name in map(plain_name, own)] for own in names]


def _groups_in_folder(path: Path) -> list[list[dict[str, Any]]]:
    """The param groups of each optimizer in a folder of ``torch.distributed.checkpoint``."""
    # Slow to import, and of no use to most.
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(path)
    metadata = reader.read_metadata()
    places = {key: place for key, place in (metadata.planner_data or {}).items() if "param_groups" in place}
    if not places:
        raise ValueError(f"the checkpoint {str(path)!r} has no optimizer state")
    found: dict[str, Any] = {}
    for key in places:
        stored = metadata.state_dict_metadata[key]
        found[key] = torch.empty(stored.size) if isinstance(stored, TensorStorageMetadata) else None
    load(found, storage_reader=reader)
    # Such as ("optimizer_0", "param_groups", 2, "decay_schedule", "start") in nested dictionaries.
    tree: dict[Any, Any] = {}
    for key, place in places.items():
        inner = tree
        cut = place.index("param_groups")
        for part in (place[:cut], *place[cut + 1 : -1]):
            inner = inner.setdefault(part, {})
        inner[place[-1]] = found[key]
    return [[groups[number] for number in sorted(groups)] for groups in tree.values()]


def _groups_in_file(path: Path) -> list[list[dict[str, Any]]]:
    """The param groups of each optimizer in a checkpoint of Lightning in one file."""
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:  # the user's own objects, which were loaded as such a moment ago
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    return [state["param_groups"] for state in checkpoint["optimizer_states"]]


def _saved_names(state_dict: Mapping[str, Any], known: Sequence[ModelParameter]) -> Sequence[Sequence[str]]:
    """The names of the parameters of each group of a checkpoint."""
    groups = state_dict["param_groups"]
    if all(isinstance(key, str) for group in groups for key in group["params"]):  # of torch.distributed.checkpoint
        return [group["params"] for group in groups]
    if all(len(group.get("param_names", ())) == len(group["params"]) for group in groups):
        return [group["param_names"] for group in groups]
    return _names_by_order(state_dict, known)


def _names_by_order(state_dict: Mapping[str, Any], known: Sequence[ModelParameter]) -> list[list[str]]:
    """Names for groups without any, which are in the order of ``model.parameters()``.

    Either they follow each other in that order, or each for itself is in it, as in "all weights, then all biases".
    """
    groups = state_dict["param_groups"]
    states = [[state_dict["state"].get(key, {}) for key in group["params"]] for group in groups]
    count = sum(map(len, states))
    trainable = [parameter for parameter in known if parameter.parameter.requires_grad]
    for order in (known, trainable):
        numbers = None
        if len(order) == count:
            numbers = _one_after_the_other(states, groups, order) or _interleaved(states, order)
        if numbers is not None:
            rank_zero_info(
                "the optimizer state in the checkpoint has no parameter names: it is read in the order of "
                "model.parameters()"
            )
            return [[order[number].name for number in own] for own in numbers]
    raise ValueError(
        f"the optimizer state in the checkpoint has no parameter names, and its {count} parameters in {len(groups)} "
        f"groups fit the {len(known)} of the model ({len(trainable)} trainable) in no way, or in several; write the "
        "names into the checkpoint, for each group as state['param_groups'][i]['param_names'] = [...] (in a checkpoint "
        "of Lightning state is checkpoint['optimizer_states'][0])"
    )


def _one_after_the_other(
    states: Sequence[Sequence[Mapping[str, Any]]],
    groups: Sequence[Mapping[str, Any]],
    order: Sequence[ModelParameter],
) -> list[list[int]] | None:
    """The places in the order that each group has, where the groups follow each other in it."""
    in_a_row = [state for group in states for state in group]
    if not all(_fits(state, parameter.parameter) for state, parameter in zip(in_a_row, order)):
        return None
    if len(states) > 1 and not any(map(_shaped, in_a_row)) and not _have_equal_options(groups):
        return None  # nothing tells that it is this way
    ends = itertools.accumulate(map(len, states))
    return [list(range(end - len(group), end)) for group, end in zip(states, ends)]


def _interleaved(
    states: Sequence[Sequence[Mapping[str, Any]]], order: Sequence[ModelParameter]
) -> list[list[int]] | None:
    """The places in the order that each group has, where each for itself is in it and the shapes allow only one way."""
    # From how many parameters of each group are given out, to the ways there (2 for several) and the groups in turn.
    ways: dict[tuple[int, ...], tuple[int, tuple[int, ...]]] = {(0,) * len(states): (1, ())}
    for parameter in order:
        longer: dict[tuple[int, ...], tuple[int, tuple[int, ...]]] = {}
        for given, (count, turns) in ways.items():
            for number, group in enumerate(states):
                if given[number] < len(group) and _fits(group[given[number]], parameter.parameter):
                    now = (*given[:number], given[number] + 1, *given[number + 1 :])
                    longer[now] = (min(longer.get(now, (0,))[0] + count, 2), (*turns, number))
        if not longer or len(longer) > _MOST_WAYS:
            return None
        ways = longer
    ((count, turns),) = ways.values()
    return None if count > 1 else [[i for i, n in enumerate(turns) if n == own] for own in range(len(states))]


def _have_equal_options(groups: Sequence[Mapping[str, Any]]) -> bool:
    keys = {key for group in groups for key in group} - _IDENTITY_KEYS
    return all(_same(group.get(key), groups[0].get(key)) for group in groups for key in keys)


def _shaped(state: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors of a parameter's state that are more than one number."""
    return [value for value in state.values() if isinstance(value, torch.Tensor) and value.ndim > 0]


def _fits(state: Mapping[str, Any], parameter: torch.Tensor) -> bool:
    """Whether a state can be of a parameter: some tensor of it has the shape, or is a factor of that (Adafactor)."""
    tensors = _shaped(state)
    return not tensors or any(
        tensor.ndim == parameter.ndim and all(a in (1, b) for a, b in zip(tensor.shape, parameter.shape))
        for tensor in tensors
    )


def _checked_state(name: str, parameter: torch.Tensor, state: Any) -> Any:
    if isinstance(state, Mapping) and not _fits(state, parameter):
        shapes = " and ".join(sorted({str(tuple(tensor.shape)) for tensor in _shaped(state)}))
        raise ValueError(
            f"the optimizer state of {name!r} in the checkpoint has the shape {shapes}, the parameter "
            f"{tuple(parameter.shape)}: it cannot go on; start the run from the weights alone"
        )
    return state


def _check_same_optimizer(optimizer: Optimizer, saved_groups: Sequence[Mapping[str, Any]]) -> None:
    ours = set(optimizer.defaults) - _FLAGS - STRENGTH_KEYS
    for group in saved_groups:
        theirs = set(group) - _FLAGS - STRENGTH_KEYS - _IDENTITY_KEYS - _SCHEDULER_KEYS
        if theirs - ours and ours - theirs:
            raise ValueError(
                f"the optimizer state in the checkpoint is not that of {type(optimizer).__name__}: it has the options "
                f"{listed(sorted(theirs - ours))} and lacks {listed(sorted(ours - theirs))}; resume with the optimizer "
                "that it is of, or start the run from the weights alone"
            )


def _names_of(optimizer: Optimizer, known: Sequence[ModelParameter]) -> list[list[str]]:
    """The names of the parameters of each param group of today."""
    known_names = {parameter.parameter: parameter.name for parameter in known}
    names = []
    for group in optimizer.param_groups:
        own = group.get("param_names") or [""] * len(group["params"])
        names.append([known_names.get(parameter, name) for parameter, name in zip(group["params"], own)])
    return names


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return a is not None and b is not None and bool(torch.equal(torch.as_tensor(a), torch.as_tensor(b)))
    return bool(a == b)


def _lr_of_a_new_group(group: Mapping[str, Any], saved_groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The lr of a group of new parameters only: its own, as far through the lr schedule as that of the others."""
    factors = {
        float(other["lr"]) / float(other["initial_lr"])
        for other in saved_groups
        if "lr" in other and other.get("initial_lr")
    }
    if len(factors) != 1 or "initial_lr" not in group or isinstance(group["lr"], torch.Tensor):
        return {}
    return {"lr": group["initial_lr"] * factors.pop()}


def _steps_in(saved: _Saved) -> int:
    """The optimizer steps that a checkpoint tells of, 0 where it tells of none."""
    counted = [int(group[STEP_KEY]) for group in saved.groups if STEP_KEY in group]
    own = [state["step"] for state in saved.state.values() if isinstance(state, Mapping) and "step" in state]
    return max(counted or map(int, own), default=0)


def _warn_of_the_rest(names: set[str], saved: _Saved) -> None:
    missing = [name for name in names if name not in saved.group_of]
    unused = [name for name in saved.group_of if name not in names and saved.state.get(saved.key_of.get(name))]
    if missing:
        rank_zero_warn(
            f"the checkpoint has no optimizer state of {_named(missing)}: new, or frozen when it was saved; they start "
            "without"
        )
    if unused:
        rank_zero_warn(
            f"the checkpoint has optimizer state of {_named(unused)} that is not used: gone from the model, or frozen "
            "now"
        )


def _named(names: Collection[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return listed(sorted(names)[:_MOST_NAMED]) + more


def _carry_scheduler(scheduler: Any, optimizer: Optimizer, carrier: _Carrier) -> None:
    """Let the state of an lr scheduler, whose lists have an entry per param group, follow the groups."""
    load, save = scheduler.load_state_dict, scheduler.state_dict

    def load_state_dict(state_dict: dict[str, Any]) -> None:
        load(_regrouped(scheduler, state_dict, optimizer.param_groups, carrier))

    def state_dict() -> dict[str, Any]:
        # torch's schedulers save every attribute, and so these two.
        return {key: value for key, value in save().items() if key not in ("load_state_dict", "state_dict")}

    scheduler.load_state_dict, scheduler.state_dict = load_state_dict, state_dict


def _regrouped(
    scheduler: Any, state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], carrier: _Carrier
) -> dict[str, Any]:
    """The state of an lr scheduler with its lists in the order of today's param groups."""
    regrouped = dict(state_dict)
    for key, value in state_dict.items():
        if key == "_schedulers":  # of SequentialLR and ChainedScheduler
            inner = zip(scheduler._schedulers, value)
            regrouped[key] = [_regrouped(scheduler, state, groups, carrier) for scheduler, state in inner]
        elif isinstance(value, (list, tuple)) and _PER_GROUP.search(key):
            if carrier.sources is None:
                if len(value) != len(groups):
                    raise ValueError(
                        f"the state of {type(scheduler).__name__} in the checkpoint is of {len(value)} param groups, "
                        f"today there are {len(groups)}; load the state of the optimizer first, which tells how they "
                        "belong together"
                    )
            elif len(value) == carrier.saved_count:
                new = [group["lr"] for group in groups] if key == "_last_lr" else getattr(scheduler, key)
                entries = [new[i] if source is None else value[source] for i, source in enumerate(carrier.sources)]
                # Functions are not saved: in the state of a LambdaLR, None is in the place of each.
                regrouped[key] = [None if callable(entry) else entry for entry in entries]
    return regrouped
