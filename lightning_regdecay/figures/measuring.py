"""Param groups as they are stepped over → the figures of each, with one collective at most."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn

from lightning_regdecay.figures.measures import OF_A_STEP, OF_AN_UPDATE, Measured, figure
from lightning_regdecay.figures.members import Member, distances
from lightning_regdecay.figures.norms import GroupL2Norm, LocalSums, Part, is_measurable, local_sums
from lightning_regdecay.figures.steps import AWAY, BEFORE, GRADIENT, UPDATE, Stepped, StepWatcher
from lightning_regdecay.groups.regions import Region
from lightning_regdecay.groups.rows import numel_of
from lightning_regdecay.optim.decoupling import is_decoupled
from lightning_regdecay.optim.holders import innermost, is_deepspeed, unwrapped, with_held
from lightning_regdecay.optim.in_force import in_force, watch
from lightning_regdecay.rules.names import TOTAL, safe_name, unique_name

_WHOLE = "whole"
"""In the place of the number of a tensor, a whole group."""
_DISTANCE = "distance"
_NEEDS_SIZES = {"rms", "equilibrium", "largest"}
_NEEDS_KIND = {"half_life", "equilibrium", "decay_share", "equilibrium_angle"}
_ADAM = {"Adam", "AdamW", "NAdam", "RAdam", "AdamW8bit", "PagedAdamW8bit", "FusedAdam", "DeepSpeedCPUAdam"}
"""Optimizers, and classes over them, that are known to come to rest as the source has it."""


class Measurer:
    """Measures the groups of optimizers.

    Args:
        figures: the names of the figures.
    """

    def __init__(self, figures: Iterable[str]) -> None:
        self.figures = tuple(figures)
        self.largest: dict[str, str] = {}
        """By group, the name of the tensor that was the largest."""
        self._told: set[str] = set()
        self._l2_norm: GroupL2Norm | None = None  # kept, as to make one takes as long as the norms of a small model
        self.parameters: Mapping[str, torch.nn.Parameter] = {}
        """Of the model, by name, during a run."""
        self._watcher: StepWatcher | None = None
        self._end_watch: Callable[[], None] | None = None
        self._watched: list[weakref.ref[Any]] = []
        self._kinds: dict[Any, bool | None] = {}

    def begin(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Begin a run.

        Args:
            parameters: of the model, by name.
        """
        self.parameters, self._l2_norm = parameters, None  # a fit that failed has left its own
        self._told.clear()

    def let_go(self) -> None:
        """Let go of the model and of its optimizers."""
        if self._end_watch is not None:
            self._end_watch()
        self.parameters, self._l2_norm, self._watcher, self._end_watch = {}, None, None, None
        self._watched, self._kinds = [], {}

    def __getstate__(self) -> dict[str, Any]:
        """For copies and other processes: what is of the run under way stays here."""
        here: dict[str, Any] = {"_l2_norm": None, "_watcher": None, "_end_watch": None, "_watched": [], "_kinds": {}}
        return {**vars(self), "parameters": {}, **here}

    # Steps.

    @property
    def of_a_step(self) -> list[str]:
        """The figures for which somebody must look on while the optimizers step."""
        return [name for name in self.figures if name in OF_A_STEP]

    def watch(self, optimizers: Callable[[], Iterable[Any]], is_over: Callable[[], bool]) -> None:
        """Look on while the optimizers step, where a figure asks for it.

        Args:
            optimizers: tells the optimizers.
            is_over: tells whether the run is over.
        """
        now = [weakref.ref(unwrapped(optimizer)) for optimizer in optimizers()]
        if not self.of_a_step or now == self._watched:
            return
        if self._end_watch is not None:  # of optimizers that others have taken the place of
            self._end_watch()
        self._watched = now

        def groups_of(optimizer: Any) -> dict[str, Stepped]:
            every, steps = list(optimizers()), {id(one) for one in with_held(optimizer)}
            stepped = {id(one) for one in every if any(id(held) in steps for held in with_held(one))}
            return {
                name: Stepped(
                    self._measurable(name, live), _number(live.group, "lr") * live.weight_decay, live.starts is not None
                )
                for name, live in live_groups(every)
                if id(live.optimizer) in stepped
            }

        updates = not OF_AN_UPDATE.isdisjoint(self.figures)
        gradients = "grad_norm" in self.figures
        self._watcher = StepWatcher(groups_of, gradients=gradients, updates=updates, is_over=is_over)
        self._end_watch = watch(optimizers(), self._watcher, is_over)

    def start_batch(self, is_due: bool, forget: bool) -> None:
        """Look on at the steps of a batch, or not; see :meth:`StepWatcher.start_batch`."""
        if self._watcher is not None:
            self._watcher.start_batch(is_due, forget)

    # Events.

    def measure(self, groups: Mapping[str, Live]) -> dict[str, dict[str, float]]:
        """The figures of each group, by its name, as far as they have a value."""
        members = {name: self._measurable(name, live) for name, live in groups.items()}
        toward = {name: members[name] for name, live in groups.items() if live.starts is not None}
        sums = {(name, _DISTANCE): sums for name, sums in distances(toward).items()}
        norms = self._norms(members, {**sums, **({} if self._watcher is None else self._watcher.sums)})
        found: dict[str, dict[str, float]] = {}
        for name, live in groups.items():
            measured = self._measured(name, live, members[name], norms)
            found[name] = {}
            for figure_name in self.figures:
                value = figure(figure_name, measured)
                if isinstance(value, str):
                    self._say_once(f"{figure_name} of group {name!r} is left out: {value}")
                elif value is not None:
                    found[name][figure_name] = value
            self._warn_if_not_finite(name, measured.norm)
        return found

    def _norms(
        self, members: Mapping[str, list[Member]], sums: Mapping[tuple[str, str], LocalSums]
    ) -> dict[tuple[str, Any], float]:
        """The norms of groups, of single tensors where one is asked for, and of what was seen of a step.

        All by one metric, so that there is at most one collective.
        """
        places: dict[str, tuple[str, Any]] = {}
        parts: dict[str, list[Part]] = {}
        for name, of_group in members.items():
            by_key: dict[Any, list[Member]] = {_WHOLE: of_group}
            if "largest" in self.figures:
                by_key = dict(enumerate([member] for member in of_group))
            for key, some in by_key.items():
                places[f"{len(places)}"] = name, key
                parts[f"{len(parts)}"] = [part for member in some for part in member.held()]
        seen = {(name, kind): f"{name}/{kind}" for name, kind in sums}
        columns = (*places, *seen.values())
        if self._l2_norm is None or self._l2_norm.groups != columns:
            self._l2_norm = GroupL2Norm(columns)
        self._l2_norm.reset()
        self._l2_norm.update({})  # torchmetrics warns of a metric that nobody updates
        self._l2_norm.add(local_sums(parts))
        self._l2_norm.add({seen[key]: of_step for key, of_step in sums.items()})
        found = {name: norm.item() for name, norm in self._l2_norm.compute().items()}
        norms = {place: found[column] for column, place in places.items()}
        norms.update({key: found[column] for key, column in seen.items()})
        if "largest" in self.figures:
            for name, of_group in members.items():
                norms[name, _WHOLE] = math.hypot(*(norms[name, number] for number in range(len(of_group))))
        return norms

    def _measured(
        self, name: str, live: Live, members: list[Member], norms: Mapping[tuple[str, Any], float]
    ) -> Measured:
        """What was measured of a group."""
        group = live.group
        known = self._kind(live) if _NEEDS_KIND.intersection(self.figures) else _Kind(None, False, None)
        sizes = []
        if _NEEDS_SIZES.intersection(self.figures):
            sizes = [numel_of([member.tensor], [member.region]) for member in members]
        largest = None
        if "largest" in self.figures and members:
            every = [norms[name, number] / math.sqrt(size or 1) for number, size in enumerate(sizes)]
            number = max(range(len(every)), key=lambda n: math.inf if math.isnan(every[n]) else every[n])
            largest = every[number]
            own = next((known for known, p in self.parameters.items() if p is members[number].tensor), "")
            region = members[number].region
            self.largest[name] = (own or str(number)) + ("" if region is None else f" {region.text}")
        return Measured(
            norm=norms[name, _WHOLE],
            numel=sum(sizes),
            weight_decay=live.weight_decay,
            lr=None if group.get("lr") is None else float(group["lr"]),
            is_decoupled=known.is_decoupled,
            is_adam_like=known.is_adam_like,
            beta=known.beta,
            before=norms.get((name, BEFORE)),
            gradient=norms.get((name, GRADIENT)),
            update=norms.get((name, UPDATE)),
            decay_of_step=None if self._watcher is None else self._watcher.decay.get(name),
            largest=largest,
            distance=norms.get((name, _DISTANCE)),
            distance_before=norms.get((name, AWAY)),
        )

    def is_decoupled(self, live: Live) -> bool | None:
        """Whether a step multiplies the weights of a group by 1 - lr·λ beside the gradient step."""
        if type(live.decaying) is torch.optim.SGD and not live.group.get("momentum"):
            return True  # the same as beside it
        key = type(live.decaying), live.group.get("decoupled_weight_decay")
        if key not in self._kinds:
            self._kinds[key] = is_decoupled(live.decaying, live.group)
        return self._kinds[key]

    def _kind(self, live: Live) -> _Kind:
        betas = live.group.get("betas")
        beta = float(betas[0]) if isinstance(betas, (list, tuple)) and betas else None
        names = {cls.__name__ for cls in type(live.decaying).__mro__}
        return _Kind(self.is_decoupled(live), beta is not None and not _ADAM.isdisjoint(names), beta)

    def _say_once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            rank_zero_info(line)

    def _measurable(self, name: str, live: Live) -> list[Member]:
        """The members of a group, without those of which no norm can be taken."""
        tensors = self.members(live)
        starts = [None] * len(tensors) if live.starts is None else live.starts()
        members = list(map(Member, tensors, live.regions or [None] * len(tensors), starts))
        found = [member for member in members if is_measurable(member.tensor)]
        if len(found) < len(members) and f"{name} in part" not in self._told:
            self._told.add(f"{name} in part")
            rank_zero_warn(
                f"{len(members) - len(found)} parameters of group {name!r} are left out of its norm and penalty: they "
                "are in a layout of which no norm can be taken"
            )
        return found

    def members(self, live: Live) -> list[torch.Tensor]:
        """The parameters of the model that a param group updates.

        DeepSpeed (0.19) puts flat parts of float32 copies in the place of a group's parameters, or nothing at all; the
        names stay.
        """
        group = live.group
        names = group["param_names"]
        if not is_deepspeed(live.optimizer) or not names or not all(name in self.parameters for name in names):
            return group["params"]  # type: ignore[no-any-return]
        return [self.parameters[name] for name in names]

    def _warn_if_not_finite(self, name: str, norm: float) -> None:
        if not math.isfinite(norm) and name not in self._told:
            self._told.add(name)
            rank_zero_warn(f"the L2 norm of group {name!r} is {norm}: its parameters hold NaN or infinity")


class _Kind(NamedTuple):
    """What kind of steps an optimizer does with a param group."""

    is_decoupled: bool | None
    is_adam_like: bool
    beta: float | None


class Live(NamedTuple):
    """A param group as its optimizer steps over it."""

    group: dict[str, Any]
    text: str
    """The rule that it is under."""
    schedule: str
    optimizer: Any
    decaying: Any
    """Of the optimizer and those that it holds, the one whose code decays the weights."""
    regions: Sequence[Region | None] = ()
    """The part of each of its tensors that is in it, None for all of it; nothing where all are whole."""
    starts: Callable[[], list[torch.Tensor | None]] | None = None
    """Tells what each of them decays toward, None for 0."""

    @property
    def weight_decay(self) -> float:
        """λ at this moment, 0 for an optimizer that knows none."""
        return float(self.group.get("weight_decay") or 0.0)

    @property
    def rate(self) -> float:
        """lr·λ at this moment, 0 where nothing trains."""
        if not any(parameter.requires_grad for parameter in self.group["params"]):
            return 0.0
        return float(self.group.get("lr") or 0.0) * self.weight_decay


def live_groups(optimizers: Iterable[Any]) -> Iterator[tuple[str, Live]]:
    """Every param group of every optimizer as it is stepped over, under the name that it has in the keys."""
    every = list(optimizers)
    names: set[str] = set()
    for optimizer in every:
        path = ""
        if len(every) > 1:
            optimizer_name = unique_name(safe_name(type(optimizer).__name__), names)
            names.add(optimizer_name)
            path = f"{optimizer_name}/"
        decaying, taken = innermost(with_held(unwrapped(optimizer))), {TOTAL}
        for found in in_force(optimizer):
            name = unique_name(safe_name(str(found.group["name"])), taken)
            taken.add(name)
            schedule = "" if found.schedule is None else found.schedule.text
            yield path + name, Live(found.group, found.text, schedule, optimizer, decaying, found.regions, found.starts)


def _number(group: Mapping[str, Any], option: str) -> float:
    return float(group.get(option) or 0.0)
