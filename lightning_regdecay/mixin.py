"""``WeightDecayMixin``: groups → optimizers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import FrameType, MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lightning_regdecay.groups.groups import DecayGroup, DecayGroups, build_decay_groups
from lightning_regdecay.groups.parameters import remember_flattened
from lightning_regdecay.optim.optimizers import (
    NO_WEIGHT_DECAY,
    check_options,
    keep_in_force,
    lr_schedulers_in,
    multiple,
    optimizers_in,
)
from lightning_regdecay.optim.resuming import WeightDecayFrom
from lightning_regdecay.retrofit import configure_by_groups, rule_texts
from lightning_regdecay.rules.rules import DecayRules, copied_rules, plain_rules, rules_by_group
from lightning_regdecay.rules.scalars import nonnegative_number

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Base
else:
    _Base = object  # the user's module brings its own, from `lightning.pytorch` or from `pytorch_lightning`

_LR_NAMES = ("lr", "learning_rate")  # as Lightning's learning rate finder looks for it


class WeightDecayMixin(_Base):
    """Weight decay per parameter group, from rules, for a ``LightningModule``; goes before it in the bases.

    The rules are the instance attribute ``decay_rules`` where it is set, else ``hparams.decay_rules``, else the class
    attribute; None counts as not given. See :class:`DecayRule` for what they may be.

    The optimizer is what :meth:`build_optimizer` returns, the scheduler what :meth:`build_lr_scheduler` returns.

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
    decay_strict: bool = True
    """Whether a rule that takes nothing is an error; False makes it a warning."""
    decay_resume: WeightDecayFrom = "rules"
    """Whose λ goes on when a run is resumed: that of the rules, or that of the "checkpoint"."""
    _given_rules: tuple[DecayRules | None, DecayRules | None] = (None, None)
    """The rules of the hyperparameters, as they are stored and as they were given."""
    _rule_texts: Mapping[tuple[str, ...], str] = MappingProxyType({})
    """Names of the parameters of a group to the text of its rule, for the groups that the optimizer was built over."""

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
        trainer = getattr(cls, "trainer", None)
        if isinstance(trainer, property) and not any(
            issubclass(base, WeightDecayMixin) and hasattr(base, "trainer") for base in cls.__mro__[1:]
        ):
            cls.trainer = trainer.setter(_checking_replaced_configuration(trainer))  # type: ignore[assignment,method-assign]

    @property
    def decay_groups(self) -> DecayGroups:
        """The groups as the rules and the parameters stand now; prints as a table, ``.explain(name)`` tells why."""
        try:
            return self._build_decay_groups()
        except AttributeError as error:  # which torch would take for a missing attribute `decay_groups`
            raise RuntimeError(f"decay_groups failed: {error}") from error

    def configure_optimizers(self) -> Any:
        """The optimizer over the decay groups, with the learning rate scheduler where there is one.

        Where a base class configures optimizers itself, these are its optimizers and schedulers, with its param groups
        cut up by the rules; unless the module has a ``build_optimizer`` of its own.

        Returns:
            The optimizer, or with a scheduler the dictionary ``{"optimizer": …, "lr_scheduler": …}``; of a base class,
            whatever it returns.

        Raises:
            ValueError: for rules that do not fit the model, an optimizer without weight decay, or an option that the
                optimizer does not have. See :func:`build_decay_groups`.
        """
        groups = self._build_decay_groups()
        theirs = self._configuration_of_a_base()
        if theirs is not None:
            config = configure_by_groups(self, groups, theirs, self.decay_resume)
        else:
            optimizer = self._build_checked_optimizer(groups)
            scheduler = self.build_lr_scheduler(optimizer)
            config = optimizer if scheduler is None else {"optimizer": optimizer, "lr_scheduler": scheduler}
            keep_in_force(optimizer, list(lr_schedulers_in(config)), self, groups, self.decay_resume)
        self._rule_texts = rule_texts(groups, config)
        return config

    def build_optimizer(self, param_groups: list[dict[str, Any]]) -> Optimizer:
        """Build the optimizer over the param groups; override it for another than the default.

        Args:
            param_groups: one per decay group, with ``params``, ``param_names``, ``name``, ``weight_decay`` and options.
                Groups of no rule, and of rules with ``decay_mult``, have no ``weight_decay``: the optimizer puts in its
                own, which ``decay_mult`` then multiplies.

        Returns:
            What the callable ``self.optimizer`` makes of them, where one is set (LightningCLI's ``OptimizerCallable``),
            else AdamW, with the learning rate ``lr`` (or ``learning_rate``) of the hyperparameters or the module.
        """
        build = getattr(self, "optimizer", None)
        if build is None:
            lr = self._lr()
            return torch.optim.AdamW(param_groups) if lr is None else torch.optim.AdamW(param_groups, lr=lr)
        if not callable(build):
            raise TypeError(
                f"self.optimizer must be a callable that takes param groups, such as an OptimizerCallable, got "
                f"{build!r}; override build_optimizer(param_groups) to build the optimizer in another way"
            )
        return build(param_groups)  # type: ignore[no-any-return]

    def build_lr_scheduler(self, optimizer: Optimizer) -> Any:
        """Build the learning rate scheduler; override it to have one.

        Args:
            optimizer: the optimizer over the decay groups.

        Returns:
            What the callable ``self.lr_scheduler`` makes of it, where one is set (LightningCLI's
            ``LRSchedulerCallable``), else None; anything that Lightning takes as ``lr_scheduler`` will do.
        """
        build = getattr(self, "lr_scheduler", None)
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
        given = self.hparams.get("decay_rules")
        # An OmegaConf object stays as it is: it belongs to the user, and holds plain data anyway.
        if given is not None and isinstance(self.hparams, dict):
            given = copied_rules(given)
            self.hparams["decay_rules"] = plain_rules(given)
            # Not the same object again: whoever changes the hyperparameter is to be noticed.
            self._given_rules = (plain_rules(given), given)

    @property
    def hparams_initial(self) -> Any:
        """As in Lightning, for the loggers; the rules as plain data."""
        hparams = super().hparams_initial
        if isinstance(hparams, dict) and hparams.get("decay_rules") is not None:
            hparams["decay_rules"] = self._loggable_rules(plain_rules(hparams["decay_rules"]))
        return hparams

    def _loggable_rules(self, rules: Any) -> Any:
        """Rules with keys that the trainer's loggers take."""
        # LightningModule.trainer raises where there is no Trainer, _trainer does not.
        trainer = getattr(self, "_trainer", None)
        loggers = [] if trainer is None else trainer.loggers
        # MLflow (3.17) refuses parameter names with `*`.
        has_mlflow = any(cls.__name__ == "MLFlowLogger" for logger in loggers for cls in type(logger).__mro__)
        return rules_by_group(rules) if has_mlflow and isinstance(rules, Mapping) else rules

    def _build_decay_groups(self) -> DecayGroups:
        trainer = getattr(self, "_trainer", None)
        if trainer is not None and trainer.strategy.model is not None:
            remember_flattened(trainer.strategy.model)  # FSDPStrategy puts its outermost wrapper around the module
        return build_decay_groups(self, self._active_rules(), strict=self.decay_strict)

    def _active_rules(self) -> DecayRules:
        own: DecayRules | None = self.__dict__.get("decay_rules")
        if own is not None:
            return own
        hyperparameter: DecayRules | None = self.hparams.get("decay_rules")
        if hyperparameter is not None:
            stored, given = self._given_rules
            return hyperparameter if given is None or hyperparameter != stored else given
        if self.decay_rules is None:
            raise ValueError(
                f"{type(self).__name__} has no decay rules; set the class attribute, decay_rules = "
                "{'*.bias': 0.0, '*': 0.05}, or save a hyperparameter of that name (rules from elsewhere: "
                "self.decay_rules = ...); {} leaves all to the optimizer's own weight decay"
            )
        return self.decay_rules

    def _lr(self) -> float | None:
        for name in _LR_NAMES:
            for value in (self.hparams.get(name), getattr(self, name, None)):
                if value is not None:
                    return nonnegative_number(name, value)
        return None

    def _build_checked_optimizer(self, groups: DecayGroups) -> Optimizer:
        """The optimizer of ``build_optimizer``, if it decays weights by these groups."""
        param_groups = [_without_multiple(group) for group in groups]
        try:
            optimizer = self.build_optimizer(param_groups)
        except ValueError as error:
            # torch's LBFGS (and those modelled on it) takes no groups at all, and says so in these words.
            if "per-parameter options" in str(error):
                raise ValueError(f"{NO_WEIGHT_DECAY.format(optimizer='the optimizer')} ({error})") from error
            raise
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"build_optimizer must return a torch.optim.Optimizer, got {optimizer!r}")
        kind = type(optimizer).__name__
        if "weight_decay" not in optimizer.defaults:
            raise ValueError(NO_WEIGHT_DECAY.format(optimizer=kind))
        names = [group.name for group in groups]
        if [param_group.get("name") for param_group in optimizer.param_groups] != names:
            raise ValueError(
                f"{kind} was not built over the decay groups {names}; build_optimizer must pass on the param_groups "
                "that it is given"
            )
        for group, param_group in zip(groups, optimizer.param_groups):
            if group.rule is not None:
                check_options(group.name, group.rule, optimizer)
                if group.rule.decay_mult is not None:
                    own = optimizer.defaults["weight_decay"]
                    param_group["weight_decay"] = multiple(group.name, group.rule, own, optimizer)
        return optimizer

    def _configuration_of_a_base(self) -> Callable[[], Any] | None:
        """The ``configure_optimizers`` of a base class, where that is to be used."""
        bases = type(self).__mro__[type(self).__mro__.index(WeightDecayMixin) + 1 :]
        base = next((base for base in bases if "configure_optimizers" in vars(base)), None)
        chosen = getattr(self.build_optimizer, "__func__", None) is not WeightDecayMixin.build_optimizer
        if base is None or base.__name__ == "LightningModule" or chosen:
            return None
        return super().configure_optimizers


def _checking_replaced_configuration(trainer: property) -> Callable[[Any, Any], None]:
    """A setter for the property ``trainer``, which Lightning sets before it asks for optimizers.

    LightningCLI (2.5 and later) replaces ``configure_optimizers`` on the instance, where no method of a class sees it.
    """

    def attach(module: Any, value: Any) -> None:
        trainer.__set__(module, value)
        replaced = vars(module).get("configure_optimizers")
        if replaced is not None and getattr(replaced, "func", None) is not _configure_over_decay_groups:
            # A partial, which Lightning sees through, and which is copied with the module.
            module.configure_optimizers = functools.partial(
                _configure_over_decay_groups, replaced, type(module).__name__
            )

    return attach


def _configure_over_decay_groups(configure_optimizers: Callable[[], Any], name: str) -> Any:
    """Call what has replaced ``configure_optimizers`` on an instance, and refuse what drops the decay rules."""
    config = configure_optimizers()
    for optimizer in optimizers_in(config):
        if not all({"name", "param_names"} <= group.keys() for group in optimizer.param_groups):
            raise MisconfigurationException(
                f"the decay rules of {name} are not in force: its configure_optimizers was replaced by one that builds "
                f"{type(optimizer).__name__} over other param groups. LightningCLI does so where it is given "
                "--optimizer: use WeightDecayCLI of lightning_regdecay.cli instead, or give the model an argument "
                "`optimizer: OptimizerCallable`, set self.optimizer to it, and choose with --model.optimizer"
            )
    return config


def _without_multiple(group: DecayGroup) -> dict[str, Any]:
    """The param group, which leaves a multiple of the optimizer's own weight decay to be filled in."""
    param_group = group.as_param_group(weight_decay=0.0)
    if group.rule is not None and group.rule.decay_mult is not None:
        del param_group["weight_decay"]
    return param_group
