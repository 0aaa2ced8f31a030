"""Rules in force for the length of a fit: in whatever optimizers a model has then, from before the first step on."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_regdecay.groups.groups import DecayGroups, build_decay_groups
from lightning_regdecay.groups.shards import remember_flattened
from lightning_regdecay.optim.checks import warn_of_lrs, warn_of_strays
from lightning_regdecay.optim.holders import unwrapped
from lightning_regdecay.optim.in_force import armed_for, every_room, has_members, put_in_force, rooms_in_force
from lightning_regdecay.optim.pulling import UNDER_DEEPSPEED
from lightning_regdecay.optim.resuming import stop_carrying
from lightning_regdecay.optim.saved_states import look_into_checkpoints
from lightning_regdecay.optim.step_room import StepRoom
from lightning_regdecay.optim.witness import StrayWitness, Witness
from lightning_regdecay.rules.crossing import GivenRules, RuleSet, parse_rule_set
from lightning_regdecay.rules.forms import KINDS, DecayRules, LrRules, loggable_rules, plain_rules, rules_by_group
from lightning_regdecay.rules.scalars import true_or_false

OF_THE_MODEL = ("log", "log_dict")
"""Methods of the model that Lightning (2.5 to 2.6) puts on every callback."""


def _callback_of_both_roots() -> type[Callback]:
    """``Callback``; where an older ``pytorch_lightning`` is loaded, also its own, as its Trainer takes no others."""
    other: Any = sys.modules.get("pytorch_lightning")
    if other is None or not str(getattr(other, "__version__", "")).startswith("2.5."):
        return Callback
    return type("Callback", (Callback, other.Callback), {})


if TYPE_CHECKING:
    AnyCallback = Callback
else:
    AnyCallback = _callback_of_both_roots()


class RulesForAFit(AnyCallback):
    """Puts decay rules in force when a fit starts, sees that they stay, and leaves all as it was at the end.

    Comes first among the callbacks, as others train in ``on_fit_start`` (the learning rate finder) or replace param
    groups there (finetuning).
    """

    def __init__(self) -> None:
        super().__init__()
        self._before: list[StepRoom] = []
        self._rooms: list[StepRoom] = []
        self._witnesses: list[Witness] = []
        self._strays: StrayWitness | None = None
        self._optimizers: list[weakref.ref[Any]] = []
        self._steps_seen = 0
        self._is_under_way = False
        self._max_epochs: int | None = None
        self._fit: object = None
        """Stands for the fit under way."""

    def __getstate__(self) -> dict[str, Any]:
        """For copies and other processes: what is of the fit under way stays here."""
        own = {name: value for name, value in vars(self).items() if name not in OF_THE_MODEL}
        return {**own, "_before": [], "_rooms": [], "_witnesses": [], "_strays": None, "_optimizers": [], "_fit": None}

    def model(self, trainer: Trainer) -> Any:
        """The module that the rules are for, None where there are none to bring."""
        return trainer.lightning_module

    def given_rules(self, model: Any) -> GivenRules:
        """The rules as they are now, in the forms that they were given in."""
        raise NotImplementedError

    def rules(self, model: Any) -> RuleSet:
        """The rules as they are now."""
        return self.given_rules(model).parsed()

    def decay_groups(self, model: Any) -> DecayGroups:
        """The groups of the rules."""
        raise NotImplementedError

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Come first, and end what a fit has left that nobody has ended."""
        if stage != "fit":
            return
        # In a new list, as Lightning goes over the old one now.
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [self, *(c for c in callbacks if c is not self)]  # type: ignore[attr-defined]
        self._fit, self._is_under_way = object(), False
        self._before, self._rooms, self._witnesses = [], [], []
        model = self.model(trainer)
        for room in [] if model is None else armed_for(model):
            if room.fit_is_over():
                room.disarm()
            else:
                self._before.append(room)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the rules in force, before a checkpoint is loaded and before anybody trains."""
        self._max_epochs = trainer.max_epochs  # before weight averaging adds an epoch without steps
        self._put_in_force(trainer)
        if self.model(trainer) is pl_module:
            _log(trainer, self.given_rules(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask lengths and peaks anew, as a run begins."""
        self._put_in_force(trainer)
        for room in self._rooms:
            room.begin_run(trainer.global_step)
            warn_of_lrs(room)
        self._witnesses = [Witness(room) for room in self._rooms]
        self._steps_seen, self._is_under_way = trainer.global_step, True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go by the rules, the model and the lengths of today, and name what the rules miss."""
        self._put_in_force(trainer, anew=True)
        for room in self._rooms:
            room.parting.look_again()
            room.parting.strengths.ask_anew()
        model = self.model(trainer)
        if self._rooms:
            known = [*trainer.optimizers, *(one for room in armed_for(model) for one in room.members)]
            self._strays = StrayWitness(model, self._rooms, known)
        warn_of_strays([room for room in self._rooms if room.steps_done], every_room())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put the rules in force in optimizers that took the place of others."""
        # The model may have set others where the epoch started, after this callback was told of that.
        self._put_in_force(trainer, anew=batch_idx == 0)
        for witness in self._witnesses:
            witness.begin_batch(is_alone=pl_module.automatic_optimization)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Stop where an optimizer was put in place inside a batch, whose step is under way."""
        if not self._rooms or any(known() is unwrapped(optimizer) for known in self._optimizers):
            return
        self._put_in_force(trainer)
        rooms = rooms_in_force([optimizer], self.model(trainer), self.rules(self.model(trainer))) or []
        if any(room.parting.changes(room.groups) for room in rooms):
            raise MisconfigurationException(
                f"this {type(unwrapped(optimizer)).__name__} was put in place inside a batch, too late for the decay "
                f"rules of {type(self.model(trainer)).__name__} to be in force in its first step; do that in "
                "on_train_epoch_start or earlier, or call apply_decay_rules where it is made"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop where steps are made past the rules."""
        is_step = trainer.global_step != self._steps_seen
        self._steps_seen = trainer.global_step
        for witness in self._witnesses:
            if witness.is_passed_by(is_step):
                self._refuse(trainer, witness.room)
        stray = None if self._strays is None else self._strays.trained()
        if stray is not None:
            raise MisconfigurationException(
                f"the decay rules of {type(self.model(trainer)).__name__} are not in force for {stray!r}: it is "
                "trained, but not by an optimizer that configure_optimizers returns; return that one too, or put the "
                "rules in force in it, with apply_decay_rules(optimizer, model, rules)"
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop where parameters change, and no optimizer makes a step."""
        if self._witnesses and not any(witness.has_stepped for witness in self._witnesses):
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop where parameters have changed, and their optimizer has made no step."""
        for witness in self._witnesses:
            if witness.was_passed_by():
                self._refuse(trainer, witness.room)

    def _refuse(self, trainer: Trainer, room: StepRoom) -> None:
        kinds = ", ".join(dict.fromkeys(type(root).__name__ for root in room.roots))
        raise MisconfigurationException(
            f"the decay rules of {type(self.model(trainer)).__name__} are not in force: parameters of {kinds} change, "
            "but not in its step(); let training call step() of the optimizer that configure_optimizers returns, or "
            "put the rules in force in the one that it calls, with apply_decay_rules(optimizer, model, rules)"
        )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write down the rules that are in force, presets as what they stand for."""
        if self.model(trainer) is pl_module:
            checkpoint.update(self.given_rules(pl_module).plain())

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave all as it was."""
        self._end(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave all as it was."""
        if stage == "fit":
            self._end(trainer)

    def _put_in_force(self, trainer: Trainer, anew: bool = False) -> None:
        """Put the rules in force in the optimizers of the Trainer.

        Args:
            trainer: the Trainer.
            anew: also where the optimizers are the same as before, as the rules may be others.
        """
        if not anew and self._rooms and self._is_complete(trainer):
            return
        model = self.model(trainer)
        if model is None:
            return
        remember_flattened(model if trainer.strategy.model is None else trainer.strategy.model)
        rooms = rooms_in_force(trainer.optimizers, model, self.rules(model))
        if rooms is None:
            if model is not trainer.lightning_module and not has_members(trainer.optimizers, model):
                return  # a module inside another, which does not train it
            groups = self.decay_groups(model)
            rooms = put_in_force(trainer.optimizers, model, groups, all_of_them=True)
        by_element = any(room.parting.asks_for_elements for room in rooms)
        if _is_deepspeed(trainer) and (by_element or any(room.parting.has_cut() for room in rooms)):
            by_factor = all(room.parting.has_factors() for room in rooms)
            for room in rooms:
                room.disarm()
            if by_element:
                raise MisconfigurationException(UNDER_DEEPSPEED)
            if by_factor:
                raise MisconfigurationException(
                    "DeepSpeed steps parameters of its own, so that lr_mult cannot be in force, a factor on the lr at "
                    "each step; give the lr itself, as in LrRule(1e-4, params=...)"
                )
            raise MisconfigurationException(
                "DeepSpeed steps parameters of its own, so decay rules can be in force only in an optimizer that is "
                f"built over the decay groups: let {type(model).__name__} have WeightDecayMixin and a build_optimizer"
            )
        self._witnesses = [one for one in self._witnesses if any(one.room is room for room in rooms)]
        reference, max_epochs = weakref.ref(trainer), self._max_epochs
        if not self._is_under_way:
            look_into_checkpoints(rooms, reference)
        for room in rooms:
            room.parting.strengths.ask = lambda: _run_length(reference(), max_epochs)
            room.parting.strengths.steps_done = lambda: _steps_done(reference())
            if all(room is not known for known in self._before):
                room.fit_is_over = _end_of_fit(trainer, self)
            if self._is_under_way and all(room is not known for known in self._rooms):
                room.parting.begin_run(room.groups, None)
                self._witnesses.append(Witness(room))
        self._rooms = rooms
        self._optimizers = [weakref.ref(unwrapped(optimizer)) for optimizer in trainer.optimizers]

    def _is_complete(self, trainer: Trainer) -> bool:
        """Whether the optimizers are those that the rules are in force in."""
        seen, now = self._optimizers, trainer.optimizers
        return len(seen) == len(now) and all(known() is unwrapped(optimizer) for known, optimizer in zip(seen, now))

    def _end(self, trainer: Trainer) -> None:
        model = self.model(trainer)
        rooms = [] if model is None else armed_for(model)
        reference, step, module = weakref.ref(trainer), trainer.global_step, weakref.ref(trainer.lightning_module)
        for room in rooms:
            room.parting.strengths.ask, room.parting.strengths.steps_done = dict, _no_steps
            if any(room is other for other in self._before):
                continue
            room.is_last_run = lambda: _is_last_run(module(), reference(), step)
            room.disarm()
            for optimizer in room.members:
                stop_carrying(optimizer)
        self._before, self._rooms, self._witnesses, self._optimizers = [], [], [], []
        self._strays = None
        self._fit, self._is_under_way = None, False
        let_go_of_model(self)


def logged_rules(name: str, rules: DecayRules, trainer: Any) -> Any:
    """Rules as the loggers of a Trainer take them, with a value for each rule.

    Args:
        name: ``"decay_rules"`` or ``"lr_rules"``.
        rules: in any form.
        trainer: the Trainer, or None.
    """
    kind, plain = KINDS[name], plain_rules(rules)
    if trainer is None:
        return plain
    # Lightning refuses a hyperparameter that the data module has as well unless the two are equal, types included.
    of_data = getattr(getattr(trainer, "datamodule", None), "hparams", {}).get(name)
    if of_data is not None and plain_rules(of_data) == plain:
        return of_data
    # MLflow (3.17) refuses parameter names with `*`.
    has_mlflow = any(cls.__name__ == "MLFlowLogger" for logger in trainer.loggers for cls in type(logger).__mro__)
    logged = loggable_rules(rules, kind)
    return rules_by_group(logged, kind) if has_mlflow else logged


def _log(trainer: Trainer, given: GivenRules) -> None:
    """Give rules to the loggers, beside the hyperparameters.

    Lightning (2.5 to 2.6) gives them the hyperparameters a little later; TensorBoard shows what it gets first.
    """
    rules = {name: logged_rules(name, rules, trainer) for name, rules in given._asdict().items() if rules is not None}
    hparams: dict[str, Any] = {}
    for holder in (trainer.datamodule, trainer.lightning_module):  # type: ignore[attr-defined]
        if getattr(holder, "_log_hyperparams", False) and isinstance(holder.hparams_initial, dict):
            hparams.update(holder.hparams_initial)
    for logger in trainer.loggers:
        logger.log_hyperparams({**hparams, **rules})


def let_go_of_model(callback: Callback) -> None:
    """Take away the methods of the model that Lightning has put on a callback, until the next fit."""
    for name in OF_THE_MODEL:
        vars(callback).pop(name, None)


class WeightDecayRules(RulesForAFit):
    """Decay rules for a model whose class is not yours to change.

    In force from the start of a fit in whatever optimizers the model has then, those of ``LightningCLI`` included.
    Their param groups stay the model's own, for schedulers, callbacks and its own code to steer and for checkpoints;
    inside of each step, every parameter has the λ of its rule. When the fit ends, model and optimizers are as before.

    Args:
        decay_rules: see :class:`~lightning_regdecay.DecayRule` for what they may be. Rules set λ and a factor on the lr
            alone.
        lr_rules: see :class:`~lightning_regdecay.LrRule`; those with ``lr_mult``.
        decay_strict: False makes rules that take nothing a warning.

    Raises:
        TypeError: for rules of an unknown form, or a ``decay_strict`` that is not True or False.
        ValueError: for a value out of range; when the fit starts, for rules that do not fit the model, or cannot be in
            force in its optimizers.
        MisconfigurationException: when the fit starts, for a model with rules of its own, or a second such callback.

    >>> WeightDecayRules({"*.bias": 0.0, "*": 0.05}).decay_rules
    {'*.bias': 0.0, '*': 0.05}
    """

    def __init__(self, decay_rules: DecayRules, *, lr_rules: LrRules | None = None, decay_strict: bool = True) -> None:
        super().__init__()
        parse_rule_set(decay_rules, lr_rules)
        self.decay_rules = decay_rules
        self.lr_rules = lr_rules
        self.decay_strict = true_or_false("decay_strict", decay_strict)

    def given_rules(self, model: nn.Module) -> GivenRules:
        """The rules in the forms that they were given in."""
        return GivenRules(self.decay_rules, self.lr_rules)

    def decay_groups(self, model: nn.Module) -> DecayGroups:
        """The groups of the rules."""
        return build_decay_groups(model, self.decay_rules, lr_rules=self.lr_rules, strict=self.decay_strict)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a model that has rules already."""
        name = type(pl_module).__name__
        others = [c for c in trainer.callbacks if isinstance(c, RulesForAFit) and c is not self]  # type: ignore[attr-defined]
        if stage == "fit" and any(other.model(trainer) is pl_module for other in others):
            raise MisconfigurationException(
                f"WeightDecayRules would bring other decay rules to {name}, which has some: by WeightDecayMixin, or by "
                "another WeightDecayRules; put all rules into one place"
            )
        super().setup(trainer, pl_module, stage)


def _end_of_fit(trainer: Trainer, callback: RulesForAFit) -> Callable[[], bool]:
    """Tells whether the fit under way is over, also where nobody has told the callback."""
    fit, of_trainer, of_callback = callback._fit, weakref.ref(trainer), weakref.ref(callback)

    def is_over() -> bool:
        trainer, callback = of_trainer(), of_callback()
        return trainer is None or callback is None or callback._fit is not fit or trainer.state.stopped

    return is_over


def _no_steps() -> int:
    return 0


def _is_deepspeed(trainer: Trainer) -> bool:
    return any(cls.__name__ == "DeepSpeedStrategy" for cls in type(trainer.strategy).__mro__)


def _is_last_run(module: Any, trainer: Any, step: int) -> bool:
    """Whether nobody has trained a model since a fit ended."""
    if module is None or trainer is None:
        return True
    steps: int = trainer.global_step
    return getattr(module, "_trainer", None) is trainer and steps == step


def _steps_done(trainer: Any) -> int:
    """The steps that an optimizer has done, where only one does steps."""
    if trainer is None or not trainer.lightning_module.automatic_optimization:
        return 0
    return int(trainer.global_step)


def _run_length(trainer: Any, max_epochs: int | None) -> dict[str, float]:
    """The optimizer steps of the run and of an epoch, as far as they are known.

    To be called when the training has started: earlier it would make the data loaders, which Lightning (2.6) then does
    not give the state that they had in the checkpoint.

    Args:
        trainer: the Trainer, or None.
        max_epochs: those in which steps are done.
    """
    # Only Fabric, or the user, knows how long the run will be, or how many steps are taken by hand, or in each epoch.
    if trainer is None or trainer.train_dataloader is None or not trainer.lightning_module.automatic_optimization:
        return {}
    if any(cls.__name__ == "GradientAccumulationScheduler" for c in trainer.callbacks for cls in type(c).__mro__):
        return {}
    batches = trainer.num_training_batches
    steps_per_epoch = batches if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)
    total_steps = trainer.estimated_stepping_batches
    if max_epochs is not None and 0 < max_epochs < (trainer.max_epochs or 0):
        total_steps = min(total_steps, steps_per_epoch * max_epochs)
    lengths = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch}
    return {name: length for name, length in lengths.items() if 0 < length < math.inf}
