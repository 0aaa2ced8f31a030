"""``WeightDecayMixin``: groups → optimizers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_regdecay.groups import DecayGroups, build_decay_groups
from lightning_regdecay.parameters import remember_flattened
from lightning_regdecay.rules import DecayRules, did_you_mean, parse_rules, plain_rules

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
    _given_rules: tuple[DecayRules | None, DecayRules | None] = (None, None)
    """The rules of the hyperparameters, as they are stored and as they were given."""

    @property
    def decay_groups(self) -> DecayGroups:
        """The groups as the rules and the parameters stand now; prints as a table, ``.explain(name)`` tells why."""
        trainer = getattr(self, "_trainer", None)
        if trainer is not None and trainer.strategy.model is not None:
            remember_flattened(trainer.strategy.model)  # FSDPStrategy puts its outermost wrapper around the module
        return build_decay_groups(self, self._rules_in_force(), strict=self.decay_strict)

    def configure_optimizers(self) -> Any:
        """The optimizer over the decay groups, with the learning rate scheduler where there is one.

        Returns:
            The optimizer, or with a scheduler the dictionary ``{"optimizer": …, "lr_scheduler": …}``.

        Raises:
            ValueError: for rules that do not fit the model, an optimizer without weight decay, or an option that the
                optimizer does not have. See :func:`build_decay_groups`.
        """
        self._warn_of_unused_configuration()
        groups = self.decay_groups
        # Multiples of the optimizer's own weight decay are filled in below, when the optimizer is there to ask.
        optimizer = self._checked_optimizer([group.as_param_group(weight_decay=0.0) for group in groups])
        for group, param_group in zip(groups, optimizer.param_groups):
            if group.rule is not None and group.rule.decay_mult is not None:
                param_group["weight_decay"] = group.rule.decay_mult * optimizer.defaults["weight_decay"]
        scheduler = self.build_lr_scheduler(optimizer)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def build_optimizer(self, param_groups: list[dict[str, Any]]) -> Optimizer:
        """Build the optimizer over the param groups; override it for another than the default.

        Args:
            param_groups: one per decay group, with ``params``, ``param_names``, ``name``, ``weight_decay`` and options.

        Returns:
            What the callable ``self.optimizer`` makes of them, where one is set (LightningCLI's ``OptimizerCallable``),
            else AdamW, with the learning rate ``lr`` (or ``learning_rate``) of the module or its hyperparameters.
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
        if given is not None:
            self.hparams["decay_rules"] = plain_rules(given)
            self._given_rules = (plain_rules(given), given)

    @property
    def hparams_initial(self) -> Any:
        """As in Lightning, for the loggers; the rules as plain data."""
        hparams = super().hparams_initial
        rules = hparams.get("decay_rules")
        if rules is not None:
            hparams["decay_rules"] = self._loggable_rules(plain_rules(rules))
        return hparams

    def _loggable_rules(self, rules: Any) -> Any:
        """Rules with keys that the trainer's loggers take."""
        trainer = getattr(self, "_trainer", None)
        loggers = [] if trainer is None else trainer.loggers
        # MLflow (3.17) refuses parameter names with `*`: it gets the groups' names as keys, the patterns as values.
        if not any(cls.__name__ == "MLFlowLogger" for logger in loggers for cls in type(logger).__mro__):
            return rules
        if not isinstance(rules, Mapping):
            return rules
        return {rule.group: plain_rules(replace(rule, group=None)) for rule in parse_rules(self._rules_in_force())}

    def _rules_in_force(self) -> DecayRules:
        own: DecayRules | None = self.__dict__.get("decay_rules")
        if own is not None:
            return own
        hyperparameter: DecayRules | None = self.hparams.get("decay_rules")
        if hyperparameter is not None:
            stored, given = self._given_rules
            return hyperparameter if given is None or hyperparameter != stored else given
        if self.decay_rules is None:
            raise ValueError(
                f"{type(self).__name__} has no decay rules; set the class attribute, decay_rules = {{'*.bias': 0.0, "
                "'*': 0.05}}, or the hyperparameter of that name ({} leaves all to the optimizer's own weight decay)"
            )
        return self.decay_rules

    def _lr(self) -> float | None:
        for holder in (self.__dict__, self.hparams):
            for name in _LR_NAMES:
                if holder.get(name) is not None:
                    return float(holder[name])
        return None

    def _checked_optimizer(self, param_groups: list[dict[str, Any]]) -> Optimizer:
        """The optimizer of ``build_optimizer``, if it decays weights by these groups."""
        names = [group["name"] for group in param_groups]
        options = {name: group["name"] for group in param_groups for name in group}
        try:
            optimizer = self.build_optimizer(param_groups)
        except ValueError as error:
            # torch's LBFGS (and those modelled on it) takes no groups at all, and says so in these words.
            if "per-parameter options" in str(error):
                raise ValueError(f"{_NO_WEIGHT_DECAY.format(optimizer='the optimizer')} ({error})") from error
            raise
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"build_optimizer must return a torch.optim.Optimizer, got {optimizer!r}")
        kind = type(optimizer).__name__
        if "weight_decay" not in optimizer.defaults:
            raise ValueError(_NO_WEIGHT_DECAY.format(optimizer=kind))
        if [group.get("name") for group in optimizer.param_groups] != names:
            raise ValueError(
                f"{kind} was not built over the decay groups {names}; build_optimizer must pass on the param_groups "
                "that it is given"
            )
        for option in options.keys() - {"params", "param_names", "name"} - optimizer.defaults.keys():
            raise ValueError(
                f"group {options[option]!r} has the option {option!r}, which {kind} does not know; "
                f"{did_you_mean(option, optimizer.defaults)}"
            )
        return optimizer

    def _warn_of_unused_configuration(self) -> None:
        """Tell a user whose base class has optimizers of its own that these are not the ones in use."""
        bases = type(self).__mro__[type(self).__mro__.index(WeightDecayMixin) + 1 :]
        base = next(base for base in bases if "configure_optimizers" in vars(base))
        chosen = type(self).build_optimizer is not WeightDecayMixin.build_optimizer
        if base.__name__ != "LightningModule" and not chosen and getattr(self, "optimizer", None) is None:
            rank_zero_warn(
                f"{base.__name__}.configure_optimizers is not used: WeightDecayMixin comes before it and builds AdamW "
                "over the decay groups; override build_optimizer(param_groups) to build another"
            )


_NO_WEIGHT_DECAY = "{optimizer} knows no weight decay, so decay rules cannot work with it; use one such as AdamW or SGD"
