"""``WeightDecayMixin``: decay rules of a ``LightningModule``, and the optimizer over their groups."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from lightning_regdecay.groups.groups import DecayGroups, build_decay_groups
from lightning_regdecay.groups.shards import remember_flattened
from lightning_regdecay.optim.building import build_over, check_signature
from lightning_regdecay.optim.configs import lr_schedulers_in, optimizers_in
from lightning_regdecay.optim.in_force import put_in_force, rooms_in_force
from lightning_regdecay.optim.resuming import carry_over_by_name
from lightning_regdecay.optim.saved_states import look_into_checkpoints, sharded_checkpoint
from lightning_regdecay.retrofit import RulesForAFit, logged_rules
from lightning_regdecay.rules.crossing import GivenRules
from lightning_regdecay.rules.forms import KINDS, DecayRules, LrRules, copied_rules, plain_rules
from lightning_regdecay.rules.scalars import nonnegative_number, true_or_false

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Base
else:
    _Base = object  # the user's module brings its own, from `lightning.pytorch` or from `pytorch_lightning`

_LR_NAMES = ("lr", "learning_rate")  # as Lightning's learning rate finder looks for it


class WeightDecayMixin(_Base):
    """Weight decay per parameter group, from rules, for a ``LightningModule``; goes before it in the bases.

    The rules are the instance attribute ``decay_rules`` where it is set, else ``hparams.decay_rules``, else the class
    attribute; None counts as not given. See :class:`DecayRule` for what they may be. Likewise ``lr_rules``, which cross
    them, see :class:`LrRule`.

    The optimizer is what :meth:`build_optimizer` returns, the scheduler what :meth:`build_lr_scheduler` returns. Where
    the class, or a base class, has a ``configure_optimizers`` of its own, the optimizers are those that it returns,
    their param groups stay as they are, and the rules are in force inside their steps.

    >>> import lightning as L
    >>> class LitLinear(WeightDecayMixin, L.LightningModule):
    ...     decay_rules = {"*.bias": 0.0, "*": 0.05}
    ...
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fc = torch.nn.Linear(3, 2)
    >>> [(group["name"], group["weight_decay"]) for group in LitLinear().configure_optimizers().param_groups]
    [('bias', 0.0), ('rest', 0.05)]
    """

    decay_rules: DecayRules | None = None
    """The rules, unless the instance or its hyperparameters hold others."""
    lr_rules: LrRules | None = None
    """Rules for the lr and other options, unless the instance or its hyperparameters hold others."""
    decay_strict: bool = True
    """Whether a rule that takes nothing is an error; False makes it a warning."""
    _rules_given: Mapping[str, tuple[DecayRules, DecayRules]] = {}
    """The rules of the hyperparameters, by their name: as they are stored, and as they were given."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # TorchScript compiles all properties but these.
        unused = [name for base in cls.__mro__ for name in vars(base).get("__jit_unused_properties__", ())]
        cls.__jit_unused_properties__ = [*unused, "decay_groups"]
        before = cls.__mro__[: cls.__mro__.index(WeightDecayMixin)]
        if any(base.__name__ == "LightningModule" for base in before):
            raise TypeError(
                f"WeightDecayMixin must come before LightningModule in the bases of {cls.__name__}: "
                f"class {cls.__name__}(WeightDecayMixin, ...)"
            )
        configure = vars(cls).get("configure_optimizers")
        if isinstance(configure, types.FunctionType):
            cls.configure_optimizers = _with_rules_in_force(configure)  # type: ignore[method-assign]
        trainer = getattr(cls, "trainer", None)
        if isinstance(trainer, property) and not hasattr(trainer.fset, "brings_rules"):
            cls.trainer = trainer.setter(_bringing_the_rules(trainer))  # type: ignore[assignment,method-assign]

    @property
    def decay_groups(self) -> DecayGroups:
        """The groups as the rules and the parameters stand now; prints as a table, ``.explain(name)`` tells why."""
        try:
            return _groups_of(self)
        except AttributeError as error:  # which torch would take for a missing attribute `decay_groups`
            raise RuntimeError(f"decay_groups failed: {error}") from error

    def configure_optimizers(self) -> Any:
        """The optimizer over the decay groups, with the learning rate scheduler where there is one.

        Where a base class configures optimizers itself, these are its optimizers and schedulers, with the rules in
        force in their steps; unless the class has a ``build_optimizer`` of its own.

        Returns:
            The optimizer, or with a scheduler the dictionary ``{"optimizer": …, "lr_scheduler": …}``; of a base class,
            whatever it returns.

        Raises:
            ValueError: for rules that do not fit the model, an optimizer without weight decay, or an option that the
                optimizer does not have. See :func:`build_decay_groups`.
        """
        theirs = _configuration_of_a_base(self)
        if theirs is None:
            return configure_own(self, self.build_optimizer, self.build_lr_scheduler)
        if not _rules_of(self) and _has_callback_with_rules(getattr(self, "_trainer", None)):
            return theirs()
        groups = _groups_of(self)
        config = theirs()
        _put_in_force(config, self, groups)
        return config

    def build_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Build the optimizer over the param groups; override it, ``build_optimizer(self, param_groups)``, for another.

        Args:
            args: ``param_groups``, a list of one for each decay group, with ``params``, ``name``, ``weight_decay`` and
                options. Groups of no rule, and of rules with ``decay_mult``, have no ``weight_decay``: the optimizer
                puts in its own, which ``decay_mult`` then multiplies.
            kwargs: nothing.

        Returns:
            What the callable ``self.optimizer`` makes of them, where one is set (LightningCLI's ``OptimizerCallable``),
            else AdamW, with the learning rate ``lr`` (or ``learning_rate``) of the hyperparameters or the module. Where
            a base class has a method of this name, with whatever arguments, it is that method.
        """
        theirs = _of_a_base(self, "build_optimizer")
        return _default_optimizer(self, *args, **kwargs) if theirs is None else theirs(*args, **kwargs)

    def build_lr_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Build the lr scheduler; override it, ``build_lr_scheduler(self, optimizer)``, to have one.

        Args:
            args: ``optimizer``, that over the decay groups.
            kwargs: nothing.

        Returns:
            What the callable ``self.lr_scheduler`` makes of it, where one is set (LightningCLI's
            ``LRSchedulerCallable``), else None; anything that Lightning takes as ``lr_scheduler`` will do. Where a base
            class has a method of this name, with whatever arguments, it is that method.
        """
        theirs = _of_a_base(self, "build_lr_scheduler")
        return _default_lr_scheduler(self, *args, **kwargs) if theirs is None else theirs(*args, **kwargs)

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: Sequence[str] | str | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """As in Lightning; the rules among the hyperparameters are stored as plain data.

        So a checkpoint loads with ``weights_only=True``, where this package is not installed. The rules as they were
        given, classes and predicates included, stay in force for this instance.
        """
        current = inspect.currentframe()
        frame = frame or (current.f_back if current else None)
        super().save_hyperparameters(*args, ignore=ignore, frame=frame, logger=logger)
        # An OmegaConf object as a whole stays: it belongs to the user, and holds plain data.
        for name in KINDS if isinstance(self.hparams, dict) else ():
            given = self.hparams.get(name)
            if given is None:
                continue
            self.hparams[name] = plain_rules(given)
            # A base class may be given what is stored already, in which predicates are but names.
            if name not in self._rules_given or plain_rules(given) != self._rules_given[name][0]:
                # Not the same object again: whoever changes the hyperparameter is to be noticed.
                self._rules_given = {**self._rules_given, name: (plain_rules(given), copied_rules(given))}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write down the rules, presets as what they stand for."""
        super().on_save_checkpoint(checkpoint)
        rules = _rules_of(self)
        if rules:
            checkpoint.update(rules.plain())

    @property
    def hparams_initial(self) -> Any:
        """As in Lightning, for the loggers; the rules in force as plain data, wherever they come from."""
        hparams = super().hparams_initial
        for name, rules in _rules_of(self)._asdict().items():
            if isinstance(hparams, dict) and name in hparams and rules is not None:
                hparams[name] = logged_rules(name, rules, getattr(self, "_trainer", None))
        return hparams


class _RulesOfModule(RulesForAFit):
    """Brings the rules of a model with the mixin into a fit, whatever its class does with its optimizers."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self._module = weakref.ref(module)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_module": _nothing}

    def model(self, trainer: Any) -> Any:
        """The module, unless it has no rules, or is inside another that has some."""
        module = self._module()
        if module is None or not _rules_of(module):
            return None
        if module is not trainer.lightning_module and _has_callback_with_rules(trainer):
            return None
        for other in trainer.lightning_module.modules():
            if other is module:
                return module
            if isinstance(other, WeightDecayMixin) and _rules_of(other) and module in other.modules():
                return None
        return module

    def given_rules(self, model: Any) -> GivenRules:
        """The rules in the forms that they were given in."""
        return _given_rules_of(model)

    def decay_groups(self, model: Any) -> DecayGroups:
        """The groups of the rules."""
        return _groups_of(model)

    def _end(self, trainer: Any) -> None:
        super()._end(trainer)
        trainer.callbacks = [callback for callback in trainer.callbacks if callback is not self]


def _nothing() -> None:
    return None


def configure_own(module: Any, build_optimizer: Callable[..., Any], build_lr_scheduler: Callable[..., Any]) -> Any:
    """The optimizer over the decay groups of a model, with the lr scheduler where there is one.

    Args:
        module: the ``LightningModule``.
        build_optimizer: makes the optimizer of param groups.
        build_lr_scheduler: makes the lr scheduler of the optimizer, or None.

    Returns:
        What ``configure_optimizers`` is to return.
    """
    groups = _groups_of(module)
    _check_signature(module, build_optimizer, "param_groups", [])
    optimizer = build_over(groups, build_optimizer)
    _check_signature(module, build_lr_scheduler, "optimizer", optimizer)
    scheduler = build_lr_scheduler(optimizer)
    config = optimizer if scheduler is None else {"optimizer": optimizer, "lr_scheduler": scheduler}
    _carry_over(optimizer, module, list(lr_schedulers_in(config)))
    reference = weakref.ref(module)
    look_into_checkpoints(put_in_force([optimizer], module, groups), lambda: getattr(reference(), "_trainer", None))
    return config


def _carry_over(optimizer: Any, module: Any, lr_schedulers: list[Any]) -> None:
    """Let an own optimizer resume by parameter name."""
    reference, given = weakref.ref(module), [weakref.ref(one) for one in lr_schedulers]

    def trainer() -> Any:
        return getattr(reference(), "_trainer", None)

    def schedulers() -> list[Any]:
        """Those that the Trainer has too, as a subclass may have made one."""
        configs = [] if trainer() is None else [config.scheduler for config in trainer().lr_scheduler_configs]
        return [*(ref() for ref in given), *(one for one in configs if getattr(one, "optimizer", None) is optimizer)]

    def steps_done() -> int:
        return 0 if trainer() is None else int(trainer().global_step)

    carry_over_by_name(optimizer, module, schedulers, lambda: sharded_checkpoint(trainer()), steps_done)


def _put_in_force(config: Any, module: Any, groups: DecayGroups) -> None:
    """Put the rules of a model in force in what its ``configure_optimizers`` returns, once."""
    optimizers = list(optimizers_in(config))
    rooms = rooms_in_force(optimizers, module, groups.rule_set) or put_in_force(optimizers, module, groups)
    reference = weakref.ref(module)
    look_into_checkpoints(rooms, lambda: getattr(reference(), "_trainer", None))


def _with_rules_in_force(configure: Callable[..., Any]) -> Callable[..., Any]:
    """A ``configure_optimizers`` of a class with the mixin: the rules are in force in what it returns."""

    @functools.wraps(configure)
    def configure_optimizers(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = configure(self, *args, **kwargs)
        if _rules_of(self) and next(optimizers_in(config), None) is not None:
            _put_in_force(config, self, _groups_of(self))
        return config

    return configure_optimizers


def _bringing_the_rules(trainer: property) -> Callable[[Any, Any], None]:
    """A setter for the property ``trainer``, which Lightning sets before it asks for optimizers.

    By no method of the class could the rules come into every fit: users override them, and LightningCLI (2.5 and later)
    replaces ``configure_optimizers`` on the instance.
    """

    def attach(module: Any, value: Any) -> None:
        trainer.__set__(module, value)
        if value is None or getattr(value, "lightning_module", None) is None or value.state.fn != "fit":
            return
        ours = [callback for callback in value.callbacks if isinstance(callback, _RulesOfModule)]
        if not any(callback._module() is module for callback in ours):
            value.callbacks = [_RulesOfModule(module), *value.callbacks]

    attach.brings_rules = True  # type: ignore[attr-defined]
    return attach


def _has_callback_with_rules(trainer: Any) -> bool:
    """Whether a Trainer, should there be one, has a callback of the user's that brings rules."""
    callbacks = getattr(trainer, "callbacks", [])
    return any(isinstance(one, RulesForAFit) and not isinstance(one, _RulesOfModule) for one in callbacks)


def _of_a_base(module: Any, name: str) -> Callable[..., Any] | None:
    """A method of a class after the mixin, None where there is none but Lightning's own."""
    bases = type(module).__mro__[type(module).__mro__.index(WeightDecayMixin) + 1 :]
    base = next((base for base in bases if name in vars(base)), None)
    if base is None or base.__name__ == "LightningModule":
        return None
    return getattr(super(WeightDecayMixin, module), name)  # type: ignore[no-any-return]


def _configuration_of_a_base(module: Any) -> Callable[[], Any] | None:
    """The ``configure_optimizers`` of a base class, where that is to be used."""
    builder = getattr(module.build_optimizer, "__func__", None)
    # Over a method of the base's own it is a part of the base's configuration.
    is_chosen = builder is not WeightDecayMixin.build_optimizer and _of_a_base(module, "build_optimizer") is None
    return None if is_chosen else _of_a_base(module, "configure_optimizers")


def _groups_of(module: Any) -> DecayGroups:
    trainer = getattr(module, "_trainer", None)
    if trainer is not None and trainer.strategy.model is not None:
        remember_flattened(trainer.strategy.model)  # FSDPStrategy puts its outermost wrapper around the module
    strict = true_or_false(f"decay_strict of {type(module).__name__}", module.decay_strict)
    rules = _given_rules_of(module)
    decay_rules: Any = rules.decay_rules  # None beside lr rules alone
    return build_decay_groups(module, decay_rules, lr_rules=rules.lr_rules, strict=strict)


def _given_rules_of(module: Any) -> GivenRules:
    rules = _rules_of(module)
    if not rules:
        raise ValueError(
            f"{type(module).__name__} has no decay rules; set the class attribute, decay_rules = "
            "{'*.bias': 0.0, '*': 0.05}, or save a hyperparameter of that name (rules from elsewhere: "
            "self.decay_rules = ...); {} leaves all to the optimizer's own weight decay"
        )
    return rules


def _rules_of(module: Any) -> GivenRules:
    return GivenRules(*(_rules_called(name, module) for name in KINDS))


def _rules_called(name: str, module: Any) -> DecayRules | None:
    own: DecayRules | None = vars(module).get(name)
    if own is not None:
        return own
    hyperparameter: DecayRules | None = module.hparams.get(name)
    if hyperparameter is not None:
        stored, given = module._rules_given.get(name, (None, None))
        return hyperparameter if given is None or hyperparameter != stored else given
    of_class = getattr(type(module), name)
    return getattr(module, name) if isinstance(of_class, property) else of_class  # type: ignore[no-any-return]


def _check_signature(module: Any, build: Callable[..., Any], argument: str, value: Any) -> None:
    """Raise for a method of the user's, such as ``build_optimizer``, that does not take its one argument."""
    function = getattr(build, "__func__", None)
    name = getattr(function, "__name__", "")
    theirs = _of_a_base(module, name) if function is getattr(WeightDecayMixin, name, object()) else None
    check_signature(build if theirs is None else theirs, f"{name} of {type(module).__name__}", argument, value)


def _default_optimizer(module: Any, param_groups: list[dict[str, Any]]) -> Any:
    build = getattr(module, "optimizer", None)
    if build is None:
        lr = _lr(module)
        return torch.optim.AdamW(param_groups) if lr is None else torch.optim.AdamW(param_groups, lr=lr)
    if not callable(build):
        raise TypeError(
            f"self.optimizer must be a callable that takes param groups, such as an OptimizerCallable, got "
            f"{build!r}; override build_optimizer(param_groups) to build the optimizer in another way"
        )
    return build(param_groups)


def _default_lr_scheduler(module: Any, optimizer: Any) -> Any:
    build = getattr(module, "lr_scheduler", None)
    if build is None:
        return None
    if not callable(build):
        raise TypeError(
            f"self.lr_scheduler must be a callable that takes the optimizer, such as an LRSchedulerCallable, got "
            f"{build!r}; override build_lr_scheduler(optimizer) to build it in another way"
        )
    scheduler = build(optimizer)
    # LightningCLI's ReduceLROnPlateau carries the name of the metric that it follows.
    monitor = getattr(scheduler, "monitor", None)
    return scheduler if monitor is None else {"scheduler": scheduler, "monitor": monitor}


def _lr(module: Any) -> float | None:
    for name in _LR_NAMES:
        for value in (module.hparams.get(name), getattr(module, name, None)):
            if value is not None:
                return nonnegative_number(name, value)
    return None
