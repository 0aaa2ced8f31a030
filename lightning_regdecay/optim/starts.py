"""The weights that rules decay toward: noted at the first step, kept where the optimizer keeps its state."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_regdecay.groups.matching import listed, nearest_names
from lightning_regdecay.groups.parameters import plain_name
from lightning_regdecay.groups.regions import local_slice
from lightning_regdecay.groups.shards import local_part, original_shape
from lightning_regdecay.rules.rules import DecayRule
from lightning_regdecay.rules.toward import START, GivenStart

START_KEY = "decay_start"
"""Where the state of a parameter holds what it decays toward, so that every checkpoint of an optimizer has it."""


class Starts:
    """What the parameters of an optimizer decay toward."""

    def __init__(self) -> None:
        self._new: list[tuple[Tensor, Tensor]] = []
        """Parameters and their weights before the step under way, which is their first."""
        self._given: Any = WeakTensorKeyDictionary()
        """From parameter to what the user has given for it, and this process's part of that."""
        self._has_warned = False

    def of(self, optimizer: Any, parameter: Tensor, name: str, rule: DecayRule) -> Tensor:
        """What this process holds of the weights that a parameter decays toward.

        Args:
            optimizer: the one that steps.
            parameter: one of its parameters.
            name: what it is called in the model.
            rule: a rule with a start.

        Raises:
            ValueError: for a start that does not fit the parameter.
        """
        if rule.start != START:
            return self.given(parameter, name, rule)
        state = _state_of(optimizer, parameter)
        kept = state.get(START_KEY)
        if kept is None:
            kept = next((start for known, start in self._new if known is parameter), None)
        if kept is None:
            self._warn_of_missing(state, name)
            kept = _kept(parameter.detach(), rule)
            self._new.append((parameter, kept))
        elif not _is_kept(kept, parameter, rule):  # torch gives a state that is loaded the type of its parameter
            kept = state[START_KEY] = _kept(kept, rule)
        return local_part(kept)[0]

    def known(self, optimizer: Any, parameter: Tensor, name: str, rule: DecayRule) -> Tensor | None:
        """The same, None before the first step."""
        if rule.start == START and START_KEY not in _state_of(optimizer, parameter):
            return None
        return self.of(optimizer, parameter, name, rule)

    def keep(self, optimizer: Any) -> None:
        """Put what is new into the state of an optimizer: its first step is done."""
        new, self._new = self._new, []
        for parameter, start in new:
            optimizer.state[parameter][START_KEY] = start

    def forget_new(self) -> None:
        """Forget what a step has noted that was not done."""
        self._new = []

    def rehearse(self, optimizer: Any, found: Iterable[tuple[Tensor, DecayRule]]) -> None:
        """Have in the state of an optimizer what ``torch.distributed.checkpoint`` is about to load into it, or to save.

        Args:
            optimizer: the one that steps, which has a state now.
            found: its parameters with the rules that they are under.
        """
        for parameter, rule in found:
            if rule.start == START and parameter in optimizer.state:
                optimizer.state[parameter].setdefault(START_KEY, _kept(parameter.detach(), rule))

    def given(self, parameter: Tensor, name: str, rule: DecayRule) -> Tensor:
        """This process's part of the weights that a user has given for a parameter.

        Raises:
            ValueError: where there are none, or of another shape.
        """
        known = self._given.get(parameter)
        if known is None or known[0] != rule.start:
            weights = local_slice(parameter, _given_weights(rule, name, parameter))
            local = local_part(parameter)[0]
            device = local.device if rule.toward_device is None else torch.device("cpu")
            dtype = local.dtype if rule.toward_dtype is None else getattr(torch, rule.toward_dtype)
            known = self._given[parameter] = rule.start, weights.detach().to(device, dtype, copy=True)
        return known[1]  # type: ignore[no-any-return]

    def _warn_of_missing(self, state: Mapping[str, Any], name: str) -> None:
        if state and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"{name!r} decays toward its weights of this moment: the optimizer has done steps before, and its "
                "state tells no start; give the start itself, toward='weights.pt', for another"
            )


def _state_of(optimizer: Any, parameter: Tensor) -> dict[str, Any]:
    found = getattr(optimizer, "state", {}).get(parameter)
    return found if isinstance(found, dict) else {}


def _kept(weights: Tensor, rule: DecayRule) -> Tensor:
    """A copy of weights as a rule has them kept."""
    device = weights.device if rule.toward_device is None else torch.device("cpu")
    dtype = weights.dtype if rule.toward_dtype is None else getattr(torch, rule.toward_dtype)
    return weights.detach().to(device=device, dtype=dtype, copy=True)


def _is_kept(kept: Tensor, parameter: Tensor, rule: DecayRule) -> bool:
    is_typed = rule.toward_dtype is None or kept.dtype == getattr(torch, rule.toward_dtype)
    return is_typed and (rule.toward_device is None or kept.device.type == "cpu")


def _given_weights(rule: DecayRule, name: str, parameter: Tensor) -> Tensor:
    source = rule.start
    weights = source.tensors if isinstance(source, GivenStart) else _loaded(str(source))
    label = f"{rule.KIND} {rule.selector_text!r} decays {name!r} toward " + (
        "a state dict" if isinstance(source, GivenStart) else repr(source)
    )
    if name not in weights:  # as one of a model with wrappers, of DDP's or torch.compile's
        weights = {plain_name(key).removeprefix("module."): tensor for key, tensor in weights.items()}
    if name not in weights:
        near = listed(nearest_names(name, [*weights]))
        raise ValueError(f"{label}, which has no weights of that name; nearest: {near}")
    found, shape = weights[name], original_shape(parameter)
    if not isinstance(found, Tensor) or found.shape != shape:
        raise ValueError(f"{label}, which has {_shape_text(found)} there, and the parameter is of shape {tuple(shape)}")
    return found


def _shape_text(found: Any) -> str:
    return f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"


@functools.lru_cache(maxsize=4)
def _read(path: str, changed: float) -> Mapping[str, Any]:
    if path.endswith(".safetensors"):
        return importlib.import_module("safetensors.torch").load_file(path)  # type: ignore[no-any-return]
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    inner = loaded.get("state_dict") if isinstance(loaded, Mapping) else None
    return inner if isinstance(inner, Mapping) else loaded


def _loaded(path: str) -> Mapping[str, Any]:
    """The state dict in a file, which a checkpoint of Lightning's has under ``state_dict``."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"toward={path!r}: there is no such file; write toward={START!r} for the weights at the start")
    try:
        weights = _read(str(file), file.stat().st_mtime)
    except Exception as error:  # of whatever kind a reader raises
        raise ValueError(f"toward={path!r} cannot be read as a state dict: {type(error).__name__}: {error}") from error
    if not isinstance(weights, Mapping):
        raise ValueError(f"toward={path!r} holds a {type(weights).__name__}, and no state dict")
    return weights
