"""Any existing model: its own optimizers and schedulers, with their param groups cut up by decay rules."""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_regdecay.groups.groups import DecayGroups, build_decay_groups
from lightning_regdecay.optim.lr_schedulers import expand_attributes, expanded
from lightning_regdecay.optim.optimizers import keep_in_force, lr_schedulers_in, optimizers_in, split_param_group
from lightning_regdecay.optim.resuming import WeightDecayFrom
from lightning_regdecay.rules.rules import DecayRules, parse_rules


class WeightDecayRules(Callback):
    """Decay rules for a model whose class is not yours to change.

    Applies to whatever ``configure_optimizers`` the model has when a fit starts, that of ``LightningCLI`` included: the
    optimizers and schedulers are the model's own, their param groups are cut up by the rules. The learning rate of each
    parameter stays what it was.

    Args:
        decay_rules: see :class:`~lightning_regdecay.DecayRule` for what they may be.
        decay_strict: False makes rules that take nothing a warning.
        decay_resume: whose λ goes on when a run is resumed: that of the ``"rules"``, or that of the ``"checkpoint"``.

    Raises:
        TypeError: for rules of an unknown form.
        ValueError: for a value out of range; when the fit starts, for rules that do not fit the model.
        MisconfigurationException: when the fit starts, for a model with rules of its own.

    >>> WeightDecayRules({"*.bias": 0.0, "*": 0.05}).decay_rules
    {'*.bias': 0.0, '*': 0.05}
    """

    def __init__(self, decay_rules: Any, *, decay_strict: bool = True, decay_resume: WeightDecayFrom = "rules") -> None:
        super().__init__()
        parse_rules(decay_rules)
        self.decay_rules: DecayRules = decay_rules
        self.decay_strict = decay_strict
        self.decay_resume = decay_resume
        self._replaced: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the rules between the Trainer and the model's ``configure_optimizers``."""
        if stage != "fit":
            return
        if hasattr(pl_module, "decay_rules"):
            raise MisconfigurationException(
                f"{type(pl_module).__name__} has WeightDecayMixin, and WeightDecayRules would bring other decay rules: "
                "take the callback away, or give its rules to the model"
            )
        self._replaced = {k: v for k, v in vars(pl_module).items() if k == "configure_optimizers"}
        theirs = pl_module.configure_optimizers
        # A partial, which Lightning sees through when it asks whether a method is overridden.
        pl_module.configure_optimizers = functools.partial(self._configure, pl_module, theirs)  # type: ignore[method-assign]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model as it was."""
        if stage == "fit" and "configure_optimizers" in vars(pl_module):
            del pl_module.configure_optimizers
            vars(pl_module).update(self._replaced)

    def _configure(self, pl_module: LightningModule, theirs: Callable[[], Any]) -> Any:
        groups = build_decay_groups(pl_module, self.decay_rules, strict=self.decay_strict)
        config = configure_by_groups(pl_module, groups, theirs, self.decay_resume)
        pl_module._rule_texts = rule_texts(groups, config)  # type: ignore[assignment]
        return config


def configure_by_groups(
    module: Any, groups: DecayGroups, configure_optimizers: Callable[[], Any], weight_decay: WeightDecayFrom
) -> Any:
    """Optimizers and schedulers as a model configures them, over its param groups cut up by decay groups.

    Args:
        module: the ``LightningModule``.
        groups: its decay groups.
        configure_optimizers: of the model.
        weight_decay: whose λ goes on in a resumed run.

    Returns:
        What ``configure_optimizers`` returns.
    """
    with _splitting(groups) as done:
        config = configure_optimizers()
    schedulers = list(lr_schedulers_in(config))
    for optimizer in optimizers_in(config):
        own = [scheduler for scheduler in schedulers if getattr(scheduler, "optimizer", None) is optimizer]
        if optimizer not in done:  # it was built before, as that of LightningCLI
            _regroup(optimizer, own, groups)
        keep_in_force(optimizer, own, module, groups, weight_decay)
    return config


def rule_texts(groups: DecayGroups, config: Any) -> dict[tuple[str, ...], str]:
    """Names of the parameters of each param group to the text of its rule."""
    texts = {}
    places = groups.by_parameter
    by_name = {group.name: groups.rule_text(group) for group in groups}
    for optimizer in optimizers_in(config):
        for param_group in optimizer.param_groups:
            for parameter in param_group["params"][:1]:
                if parameter in places:
                    texts[tuple(param_group.get("param_names", ()))] = by_name.get(places[parameter].group, "-")
    return texts


@contextlib.contextmanager
def _splitting(groups: DecayGroups) -> Iterator[Mapping[Optimizer, list[int]]]:
    """Cut up param groups as optimizers receive them, so that lr schedulers are built over the parts.

    Yields:
        For every optimizer that is built meanwhile, from which of its given param groups each part is.
    """
    done: weakref.WeakKeyDictionary[Optimizer, list[int]] = weakref.WeakKeyDictionary()
    add_param_group = Optimizer.add_param_group

    def add(optimizer: Optimizer, param_group: dict[str, Any]) -> None:
        if not isinstance(param_group, dict) or isinstance(param_group.get("params"), set):
            add_param_group(optimizer, param_group)  # which says what is wrong
            return
        parents = done.setdefault(optimizer, [])
        number = parents[-1] + 1 if parents else 0
        for part in split_param_group(param_group, groups, optimizer):
            add_param_group(optimizer, part)
            parents.append(number)

    with contextlib.ExitStack() as stack:
        stack.callback(setattr, Optimizer, "add_param_group", add_param_group)
        Optimizer.add_param_group = add  # type: ignore[method-assign,assignment]
        for scheduler_class in _all_subclasses(LRScheduler):
            if "__init__" in vars(scheduler_class):
                stack.callback(setattr, scheduler_class, "__init__", scheduler_class.__init__)
                scheduler_class.__init__ = _with_expanded_lists(scheduler_class.__init__, done)
        yield done


def _all_subclasses(cls: Any) -> set[Any]:
    return {cls}.union(*map(_all_subclasses, cls.__subclasses__()))


def _with_expanded_lists(init: Callable[..., None], done: Mapping[Optimizer, list[int]]) -> Callable[..., None]:
    """The constructor of an lr scheduler, for lists with an entry per param group as it was before it was cut up."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def expanding(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        optimizer = bound.arguments.get("optimizer")
        parents = done.get(optimizer, []) if isinstance(optimizer, Optimizer) else []
        if parents and parents[-1] + 1 < len(parents):
            bound.arguments.update(expanded(bound.arguments, parents))
        init(*bound.args, **bound.kwargs)

    return expanding


def _regroup(optimizer: Optimizer, lr_schedulers: Sequence[Any], groups: DecayGroups) -> None:
    """Cut up the param groups of a finished optimizer, and the lists of its lr schedulers with an entry for each."""
    parts: list[dict[str, Any]] = []
    parents: list[int] = []
    given = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    for number, param_group in enumerate(given):
        for part in split_param_group(param_group, groups, optimizer):
            parts.append(part)
            parents.append(number)
            optimizer.param_groups.append(part)
    for scheduler in lr_schedulers:
        expand_attributes(scheduler, parents)
