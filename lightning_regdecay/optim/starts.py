"""The weights that rules decay toward: noted at the first step, kept where the optimizer keeps its state."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_regdecay.groups.matching import listed, nearest_names
from lightning_regdecay.groups.parameters import plain_name
from lightning_regdecay.groups.places import Found
from lightning_regdecay.groups.regions import local_slice
from lightning_regdecay.groups.shards import local_part, original_shape
from lightning_regdecay.rules.rules import DecayRule
from lightning_regdecay.rules.toward import START, GivenStart

START_KEY = "decay_start"
"""Where the state of a parameter holds what it decays toward, so that every checkpoint of an optimizer has it."""
_MOST_NAMED = 3


class Starts:
    """What the parameters of an optimizer decay toward."""

    def __init__(self) -> None:
        self._known: Any = WeakTensorKeyDictionary()
        """From parameter to its start, which the state of the optimizer has too, once it has anything."""
        self._new: list[tuple[Tensor, Tensor]] = []
        """Parameters and their weights before the step under way, which is their first."""
        self._unwritten: Any = WeakTensorKeyDictionary()
        """Starts that no state has yet."""
        self._provisional: Any = WeakTensorKeyDictionary()
        """What holds the place of a start in a state before training begins."""
        self._given: Any = WeakTensorKeyDictionary()
        """From parameter to this process's parts of what the user has given for it."""
        self._files: dict[str, Mapping[str, Any]] = {}
        """What was read, until the first step is done."""
        self._loading: list[Any] = []
        """Starts in the state that is being loaded."""
        self._has_warned = False

    # In a step.

    def of(self, optimizer: Any, found: Found, rule: DecayRule) -> Tensor:
        """What this process holds of the weights that a parameter decays toward.

        Args:
            optimizer: the one that steps.
            found: one of its parameters.
            rule: a rule with a start.

        Raises:
            ValueError: for a start that does not fit the parameter.
        """
        if rule.start != START:
            return self.given(found, rule)
        parameter = found.parameter
        kept = self._kept_in(optimizer, parameter)
        if kept is None:
            kept = next((start for new, start in self._new if new is parameter), None)
        if kept is None:
            if _has_stepped(_state_of(optimizer, parameter)) and not self._has_warned:
                self._has_warned = True
                _warn_of_missing([found.name])
            kept = _as_kept(parameter.detach(), rule)
            self._new.append((parameter, kept))
        if kept.shape != parameter.shape:
            raise ValueError(
                f"{found.name!r} decays toward its start, which is of shape {tuple(kept.shape)} in the state of the "
                f"optimizer, and the parameter is of shape {tuple(parameter.shape)}; give the start itself, "
                "toward='weights.pt', or begin with a new optimizer"
            )
        if parameter in self._known and START_KEY not in _state_of(optimizer, parameter):
            self._unwritten[parameter] = kept  # somebody has emptied the state
        if not _is_kept(kept, rule):  # torch gives a state that is loaded the type of its parameter
            kept = self._known[parameter] = _as_kept(kept, rule)
            _write(optimizer, parameter, kept)
        return local_part(kept)[0]

    def known(self, optimizer: Any, found: Found, rule: DecayRule) -> Tensor | None:
        """The same, None before the first step."""
        if rule.start == START and self._kept_in(optimizer, found.parameter) is None:
            return None
        return self.of(optimizer, found, rule)

    def keep(self, optimizer: Any) -> None:
        """Put what is new into the state of an optimizer, whose step is done."""
        self._files = {}
        for parameter, start in self._new:
            self._known[parameter] = self._unwritten[parameter] = start
        self._new = []
        if not len(self._unwritten):
            return
        # Into a state of nothing else, from which some conclude that it is there; but some never have one.
        has_none = not any(set(state) - {START_KEY} for state in optimizer.state.values() if isinstance(state, dict))
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for parameter, start in [pair for pair in self._unwritten.items() if id(pair[0]) in own]:
            if has_none or _state_of(optimizer, parameter):
                optimizer.state[parameter][START_KEY] = start
                del self._unwritten[parameter]

    def forget_new(self) -> None:
        """Forget what a step has noted that was not done."""
        self._new = []

    # Outside of steps.

    def begin_run(self, optimizers: Iterable[Any], found: Sequence[tuple[Found, DecayRule]], steps_done: int) -> None:
        """Begin a run, with starts of its own, or go on with one, whose starts are to be there.

        Args:
            optimizers: those that step.
            found: their parameters that decay toward a start, with their rules.
            steps_done: the steps of the run that were done before.
        """
        optimizers, own = list(optimizers), [(one, rule) for one, rule in found if rule.start == START]
        if steps_done == 0:
            self.forget([], optimizers)
            return
        missing = [
            one.name
            for one, _ in own
            if one.parameter.requires_grad and all(self._kept_in(o, one.parameter) is None for o in optimizers)
        ]
        if missing:
            self._has_warned = True
            _warn_of_missing(missing)

    def forget(self, wanted: Sequence[tuple[Found, DecayRule]], optimizers: Iterable[Any]) -> None:
        """Forget the starts of all parameters but some."""
        kept = {id(found.parameter) for found, rule in wanted if rule.start == START}
        for optimizer in optimizers:
            for parameter, state in getattr(optimizer, "state", {}).items():
                if isinstance(state, dict) and id(parameter) not in kept:
                    state.pop(START_KEY, None)
        for starts in (self._known, self._unwritten, self._provisional):
            for parameter in [parameter for parameter in starts if id(parameter) not in kept]:
                del starts[parameter]

    def rehearse(self, optimizer: Any, found: Iterable[tuple[Found, DecayRule]]) -> None:
        """Have in the state of an optimizer what ``torch.distributed.checkpoint`` is about to load into it, or to save.

        Args:
            optimizer: the one that steps, which has a state now.
            found: its parameters with the rules that they are under.
        """
        for one, rule in found:
            if rule.start == START and START_KEY not in optimizer.state.get(one.parameter, {START_KEY: None}):
                start = self._known.get(one.parameter)
                if start is None:
                    start = self._provisional[one.parameter] = _as_kept(one.parameter.detach(), rule)
                optimizer.state[one.parameter][START_KEY] = start

    def note_loading(self, state_dict: Mapping[str, Any]) -> None:
        """Note the starts in a state that is about to be loaded, in the order of its parameters."""
        states = state_dict.get("state", {})
        order = [key for group in state_dict.get("param_groups", ()) for key in group["params"]]
        self._loading = [states.get(key, {}).get(START_KEY) for key in order]

    def loaded(self, optimizer: Any, found: Sequence[tuple[Found, DecayRule]]) -> None:
        """Take up the starts of a state that was loaded, in the types that they were saved in.

        torch (2.6 to 2.13) gives them those of their parameters.
        """
        order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        saved, self._loading = self._loading, []
        for parameter, start in zip(order, saved) if len(order) == len(saved) else ():
            now = _state_of(optimizer, parameter).get(START_KEY)
            if isinstance(start, Tensor) and isinstance(now, Tensor) and start.dtype != now.dtype:
                start = start.detach().to(now.device, copy=True)
                if start.shape == now.shape and torch.equal(start.to(now.dtype), now):
                    optimizer.state[parameter][START_KEY] = start
        for starts in (self._known, self._unwritten, self._provisional):
            starts.clear()
        own = {id(parameter) for parameter in order}
        missing = [
            one.name
            for one, rule in found
            if rule.start == START and id(one.parameter) in own and self._kept_in(optimizer, one.parameter) is None
        ]
        if (missing and any(isinstance(start, Tensor) for start in saved)) or (missing and _any_stepped(optimizer)):
            _warn_of_missing(missing)

    # Starts that are given.

    def given(self, found: Found, rule: DecayRule) -> Tensor:
        """This process's part of the weights that a user has given for a parameter.

        Raises:
            ValueError: where there are none, or of another shape.
        """
        parameter, key = found.parameter, (rule.start, rule.toward_dtype, rule.toward_device)
        if key not in self._given.setdefault(parameter, {}):
            weights = local_slice(parameter, self._given_weights(rule, found))
            local = local_part(parameter)[0]
            device = local.device if rule.toward_device is None else torch.device("cpu")
            dtype = local.dtype if rule.toward_dtype is None else getattr(torch, rule.toward_dtype)
            self._given[parameter][key] = weights.detach().to(device, dtype, copy=True)
        return self._given[parameter][key]  # type: ignore[no-any-return]

    def take_given(self, other: Starts, parameters: Iterable[Tensor]) -> None:
        """Take over what another has read for some parameters, so that it is read once."""
        for parameter in parameters:
            if parameter in other._given:
                self._given[parameter] = other._given[parameter]

    def _given_weights(self, rule: DecayRule, found: Found) -> Tensor:
        source = rule.start
        is_state = isinstance(source, GivenStart)
        weights = source.tensors if isinstance(source, GivenStart) else self._read(str(source))
        label = f"{rule.KIND} {rule.selector_text!r} decays {found.name!r} toward "
        label += "a state dict" if is_state else repr(source)
        names = found.names or (found.name,)
        if not any(name in weights for name in names):  # as one of a model with wrappers, of DDP's or torch.compile's
            weights = {plain_name(key).removeprefix("module."): tensor for key, tensor in weights.items()}
        name = next((name for name in names if name in weights), None)
        if name is None:
            near = listed(nearest_names(found.name, [*weights]))
            raise ValueError(f"{label}, which has no weights of that name; nearest: {near}")
        tensor, shape = weights[name], original_shape(found.parameter)
        if not isinstance(tensor, Tensor) or tensor.shape != shape:
            what = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise ValueError(f"{label}, which has {what} there, and the parameter is of shape {tuple(shape)}")
        return tensor

    def _read(self, path: str) -> Mapping[str, Any]:
        """The state dict in a file, which a checkpoint of Lightning's has under ``state_dict``."""
        if path in self._files:
            return self._files[path]
        if not Path(path).is_file():
            raise ValueError(
                f"toward={path!r}: there is no such file; write toward={START!r} for the weights at the start"
            )
        try:
            if path.endswith(".safetensors"):
                loaded = importlib.import_module("safetensors.torch").load_file(path)
            else:
                loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # of whatever kind a reader raises
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"toward={path!r} cannot be read as a state dict: {what}") from error
        inner = loaded.get("state_dict") if isinstance(loaded, Mapping) else None
        weights = inner if isinstance(inner, Mapping) else loaded
        if not isinstance(weights, Mapping):
            raise ValueError(f"toward={path!r} holds a {type(weights).__name__}, and no state dict")
        self._files[path] = weights
        return weights

    def _kept_in(self, optimizer: Any, parameter: Tensor) -> Tensor | None:
        """The start of a parameter that an optimizer has, or had before somebody emptied its state."""
        kept = _state_of(optimizer, parameter).get(START_KEY)
        if kept is not None and kept is self._provisional.get(parameter):
            return None
        return self._known.get(parameter) if kept is None else kept  # type: ignore[no-any-return]


def _state_of(optimizer: Any, parameter: Tensor) -> dict[str, Any]:
    found = getattr(optimizer, "state", {}).get(parameter)
    return found if isinstance(found, dict) else {}


def _write(optimizer: Any, parameter: Tensor, start: Tensor) -> None:
    state = _state_of(optimizer, parameter)
    if START_KEY in state:
        state[START_KEY] = start


def _has_stepped(state: Mapping[str, Any]) -> bool:
    """Whether an optimizer has stepped over a parameter; GradScaler lets fused ones make a state and skip the step."""
    others = {key: value for key, value in state.items() if key != START_KEY}
    return bool(others) and not ("step" in others and float(others["step"]) == 0)


def _any_stepped(optimizer: Any) -> bool:
    return any(_has_stepped(state) for state in optimizer.state.values() if isinstance(state, dict))


def _warn_of_missing(names: Sequence[str]) -> None:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    rank_zero_warn(
        f"the start of {listed(names[:_MOST_NAMED])}{more} is not known: steps were done before, and the state of the "
        "optimizer does not have it; decay is toward the weights of the next step; give the start itself, "
        "toward='weights.pt', for another"
    )


def _as_kept(weights: Tensor, rule: DecayRule) -> Tensor:
    """A copy of weights as a rule has them kept."""
    device = weights.device if rule.toward_device is None else torch.device("cpu")
    dtype = weights.dtype if rule.toward_dtype is None else getattr(torch, rule.toward_dtype)
    return weights.detach().to(device=device, dtype=dtype, copy=True)


def _is_kept(kept: Tensor, rule: DecayRule) -> bool:
    is_typed = rule.toward_dtype is None or kept.dtype == getattr(torch, rule.toward_dtype)
    return is_typed and (rule.toward_device is None or kept.device.type == "cpu")
