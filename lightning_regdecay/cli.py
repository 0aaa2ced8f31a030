"""``WeightDecayCLI``: a ``LightningCLI`` under which the decay rules hold, by every way to choose an optimizer."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NoReturn, cast

import yaml  # type: ignore[import-untyped]
from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import (
    LightningArgumentParser,
    LightningCLI,
    _global_add_class_path,  # no public way (2.5 to 2.6) to name the class of an optimizer that is fixed
    instantiate_class,
)
from lightning.pytorch.utilities.model_helpers import is_overridden

try:
    from jsonargparse import Namespace
    from jsonargparse._typehints import ActionTypeHint
except ModuleNotFoundError as error:  # LightningArgumentParser says so, with the command that installs it
    if str(error.name).partition(".")[0] != "jsonargparse":
        raise
    ActionTypeHint = object  # type: ignore[assignment,misc]

import lightning_regdecay.monitor  # noqa: F401, so that its short name is known
from lightning_regdecay.mixin import WeightDecayMixin, configure_own
from lightning_regdecay.rules.forms import KINDS, parse_as, plain_rules
from lightning_regdecay.rules.regions import PADDING, is_slice
from lightning_regdecay.rules.rules import DecayRule, is_schedule
from lightning_regdecay.rules.selectors import SELECTORS, Rule, field_names
from lightning_regdecay.rules.stages import is_list

_GROUPS = "groups"
# Fields of which one takes the place of the other.
_INSTEAD = [
    ("weight_decay", "decay_mult"),
    ("weight_decay", "of"),
    ("lr", "lr_mult"),
    ("steps", "epochs", "fraction"),
    ("delay_steps", "delay_epochs"),
]
_STAGE = re.compile(r"stage_\d+")
# Where a configuration holds the arguments of a model: of one class, of any subclass.
_MODEL_ARGUMENTS = ("model", "model.init_args")


class WeightDecayCLI(LightningCLI):
    """``LightningCLI`` for models with :class:`WeightDecayMixin`; takes the same arguments.

    - Arguments ``decay_rules`` and ``lr_rules``, of the model or a callback, are checked when they are parsed, and each
      of their rules may be changed on the command line: ``--model.decay_rules.head.* 0.01``,
      ``--model.decay_rules.no_decay.max_ndim 1``, ``--model.lr_rules.head.*.lr_mult 10``; of a list of schedules one
      stage, ``--model.decay_rules.head.*.stage_2.end 0.1``.
    - The callbacks of this package have short names: ``--trainer.callbacks WeightDecayMonitor``.
    - ``--optimizer`` and ``--lr_scheduler`` build over the decay groups.
    - The subcommand ``groups`` prints the groups, and with ``--parameter NAME`` why that parameter is where it is.

    Models without the mixin are run as by ``LightningCLI``.

    Raises:
        ModuleNotFoundError: without jsonargparse, with the command that installs it.
    """

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """As in Lightning; the parser can change single rules."""
        parser: Any = super().init_parser(**kwargs)
        # Not by the argument parser_class, which LightningCLI has from 2.6 on; it may be the user's.
        parser.__class__ = _with_rules(cast(Any, type(parser)))
        return cast(LightningArgumentParser, parser)

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """As in Lightning, with one more subcommand."""
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        if add_subcommands:
            self._add_groups_subcommand(subparser_kwargs.get("fit", {}))

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """As in Lightning; refuses decay rules that are none."""
        super().parse_arguments(parser, args)
        subcommand = self.config.get("subcommand")
        config = self.config[subcommand] if subcommand else self.config
        own = self._groups_parser if subcommand == _GROUPS else self._parser(subcommand)
        for path, rules in _given_rules(config, own.callback_keys):
            if rules is not None:
                try:
                    parse_as(rules, KINDS[path.rpartition(".")[2]])
                except (TypeError, ValueError) as error:
                    parser.error(f"{path}: {error}")

    def _parse_ckpt_path(self) -> None:
        """As in Lightning, which takes the hyperparameters of a checkpoint; but decay rules that are given hold.

        Lightning (2.6) does so for a checkpoint that is given as a file, in ``parse_arguments``, before anything public
        is called. So a run that asks for other rules would go on with the old ones, and say nothing.
        """
        subcommand = self.config.get("subcommand")
        config = self.config[subcommand] if subcommand else {}
        given = {
            (path, name): config.get(f"{path}.{name}")
            for path in _MODEL_ARGUMENTS
            for name in (KINDS if config.get(path) else ())
        }
        super()._parse_ckpt_path()
        for (path, name), rules in given.items():
            key = f"{subcommand}.{path}"
            if rules is not None and self.config.get(key):
                self.config[f"{key}.{name}"] = rules

    def instantiate_classes(self) -> None:
        """As in Lightning; for ``groups`` the model alone, so ``self.trainer`` and ``self.datamodule`` are None."""
        if self.subcommand != _GROUPS:
            super().instantiate_classes()
            return
        config = self.config.clone()
        for key in vars(self.config[_GROUPS]):
            if key not in self._groups_parser.made:
                del config[_GROUPS][key]
        # jsonargparse calls it so from 4.49 on.
        instantiate = getattr(self.parser, "instantiate", None) or self.parser.instantiate_classes
        self.config_init = instantiate(config)
        self.model = self.config_init[_GROUPS]["model"]
        self.datamodule = self.trainer = None  # type: ignore[assignment]

    def groups(self, model: LightningModule, parameter: str | None = None) -> None:
        """Print the decay groups of a model, and which rule took a parameter.

        Args:
            model: the model, which has :class:`WeightDecayMixin`.
            parameter: the name of a parameter.

        Raises:
            SystemExit: for a model without the mixin, rules that do not fit it, and a parameter that it does not have.
        """
        name = type(model).__name__
        if not isinstance(model, WeightDecayMixin):
            _exit_with(f"{name} has no decay groups: put WeightDecayMixin before LightningModule in its bases")
        remark = (
            f"{name}.configure_model is not called here, as it may need the Trainer: parameters that it makes are not "
            "known; WeightDecayMonitor prints all groups when the fit starts"
        )
        is_deferred = is_overridden("configure_model", model)
        try:
            groups = model.decay_groups
            explanation = "" if parameter is None else f"\n{groups.explain(parameter)}\n"
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            text = str(error.args[0] if error.args else error)  # a KeyError shows its text in quotes
            _exit_with(f"{text}\n{remark}" if is_deferred else text)
        if is_deferred:
            rank_zero_warn(remark)
        print(groups)
        print(explanation, end="")

    def _add_groups_subcommand(self, parser_kwargs: dict[str, Any]) -> None:
        """Add a subcommand that takes what ``fit`` takes, so that the same configuration files do."""
        description = "Print the decay groups of the model; makes nothing but the model and trains nothing."
        subcommands = cast(Any, self.parser).subcommands
        parser: Any = self.init_parser(**{**parser_kwargs, "description": description})
        # Beside the model what it, or anything else, takes arguments from.
        parser.made = {"model"}.union(*(other.linked for other in subcommands.choices.values()))
        self._add_arguments(parser)
        trainer_class = self.trainer_class if isinstance(self.trainer_class, type) else Trainer
        parser.add_method_arguments(trainer_class, "fit", skip=set(LightningCLI.subcommands()["fit"]))
        parser.add_argument(
            "--parameter",
            type=str,
            default=None,
            help="The name of a parameter: print also which rule took it, and why no earlier one did.",
        )
        self._groups_parser = parser
        subcommands.add_subcommand(_GROUPS, parser, help=description)

    def _run_subcommand(self, subcommand: str) -> None:
        """As in Lightning, which takes subcommands for methods of the Trainer."""
        if subcommand == _GROUPS:
            self.groups(self.model, self.config[_GROUPS].get("parameter"))
        else:
            super()._run_subcommand(subcommand)

    def _add_configure_optimizers_method_to_model(self, subcommand: str | None) -> None:
        """Let the model build what ``--optimizer`` and ``--lr_scheduler`` say over its decay groups.

        Lightning builds the optimizer here, over ``model.parameters()``, and no public method comes before it.
        """
        parser = self._parser(subcommand)
        optimizers, lr_schedulers = (
            [key for key, (_, link_to) in register.items() if link_to == "AUTOMATIC"]
            for register in (parser._optimizers, parser._lr_schedulers)
        )
        alone = len(optimizers) == 1 and len(lr_schedulers) <= 1
        model: Any = self.model
        if not (isinstance(self.model, WeightDecayMixin) and self.auto_configure_optimizers and alone):
            super()._add_configure_optimizers_method_to_model(subcommand)
            return
        optimizer = self._chosen(parser._optimizers, optimizers)
        lr_scheduler = self._chosen(parser._lr_schedulers, lr_schedulers)
        if optimizer is None and lr_scheduler is None:
            return
        self._warn_of_what_is_replaced(optimizer, lr_scheduler)
        # A partial, which Lightning sees through when it asks whether a method is overridden.
        model.configure_optimizers = functools.partial(
            _configure_optimizers, model, self.configure_optimizers, optimizer, lr_scheduler
        )

    def _chosen(self, register: dict[str, Any], keys: list[str]) -> Any:
        """The class and the arguments that the configuration has for an optimizer or a scheduler, or None."""
        if not keys:
            return None
        [key] = keys
        base, _ = register[key]
        init = self._get(self.config_init, key)
        return init if isinstance(base, tuple) else _global_add_class_path(base, init)

    def _warn_of_what_is_replaced(self, optimizer: Any, lr_scheduler: Any) -> None:
        """Tell a user whose model brings its own optimizer or scheduler that it is not the one in use."""
        cls = type(self.model)
        replaced = (
            ["configure_optimizers"] if cls.configure_optimizers is not WeightDecayMixin.configure_optimizers else []
        )
        for init, builder, attribute in (
            (optimizer, "build_optimizer", "optimizer"),
            (lr_scheduler, "build_lr_scheduler", "lr_scheduler"),
        ):
            if init is not None:
                if getattr(cls, builder) is not getattr(WeightDecayMixin, builder):
                    replaced.append(builder)
                elif getattr(self.model, attribute, None) is not None:
                    replaced.append(attribute)
        given = [init["class_path"].rpartition(".")[2] for init in (optimizer, lr_scheduler) if init is not None]
        for name in replaced:
            rank_zero_warn(f"{cls.__name__}.{name} is not used: the configuration has chosen {' and '.join(given)}")


def _given_rules(config: Any, callback_keys: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The rules of the model and of the callbacks, None where an argument is not there, after their paths.

    Args:
        config: of one subcommand.
        callback_keys: the keys of callbacks that have arguments of their own.
    """
    for path in (*_MODEL_ARGUMENTS, *(f"{key}{end}" for key in callback_keys for end in ("", ".init_args"))):
        for argument in KINDS:
            yield f"{path}.{argument}", config.get(f"{path}.{argument}")
    callbacks = config.get("trainer.callbacks")
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if isinstance(callback, Namespace):
            name = str(callback.get("class_path")).rpartition(".")[2]
            for argument in KINDS:
                yield f"trainer.callbacks: {name}.{argument}", callback.get(f"init_args.{argument}")


def _configure_optimizers(model: WeightDecayMixin, customize: Any, optimizer: Any, lr_scheduler: Any) -> Any:
    """The optimizer over the decay groups, with the scheduler, as ``customize`` puts them together.

    Args:
        model: the model.
        customize: ``LightningCLI.configure_optimizers``, which users override.
        optimizer: the class and the arguments that were chosen, or None for the model's own.
        lr_scheduler: likewise.
    """
    config = configure_own(
        model,
        model.build_optimizer if optimizer is None else functools.partial(instantiate_class, init=optimizer),
        model.build_lr_scheduler if lr_scheduler is None else functools.partial(instantiate_class, init=lr_scheduler),
    )
    if not isinstance(config, dict):
        return customize(model, optimizer=config, lr_scheduler=None)
    if isinstance(config["lr_scheduler"], dict):  # by the model itself, and complete
        return config
    return customize(model, optimizer=config["optimizer"], lr_scheduler=config["lr_scheduler"])


class _RulesAction(ActionTypeHint):
    """A typed argument of which ``--decay_rules.KEY VALUE`` changes one rule and leaves the others.

    jsonargparse (4.53) itself splits the key at its first dot and replaces what is there: ``head.*`` becomes
    ``{head: {'*': …}}``, and ``no_decay.weight_decay`` takes the rule's other fields away.
    """

    rules: Any
    """The rules to begin with where none are given."""
    kind: type[Rule]
    """The kind of rules that they are."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 4:  # parser, namespace, value, option; with none it makes the action
            parser, namespace, value, option = args
            own = next((own for own in self.option_strings if str(option).startswith(f"{own}.")), None)
            if own is not None:
                rules = namespace.get(self.dest)
                rules = self.rules if rules is None else rules
                args = (
                    parser,
                    namespace,
                    _override_rule(rules, option[len(own) + 1 :], _value(option, value), self.kind),
                    own,
                )
        return super().__call__(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _check_type(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        """As in jsonargparse; the name of a preset may stand where the annotation has mappings or lists alone."""
        check = super()._check_type
        try:
            return check(_with_slices(value), *args, **kwargs)  # type: ignore[no-untyped-call]
        except (TypeError, ValueError):
            if isinstance(value, str) and value.isidentifier() and isinstance(_read(value), str):
                for rules in ({"preset": value}, [{"preset": value}]):
                    with contextlib.suppress(TypeError, ValueError):
                        return check(rules, *args, **kwargs)  # type: ignore[no-untyped-call]
            raise


class _RulesParser(LightningArgumentParser):
    """A parser on whose command line single rules of an argument for rules can be changed."""

    made: Collection[str] | None = None
    """The keys whose classes are instantiated; None for all."""
    linked: frozenset[str] = frozenset()
    """The keys whose instances give arguments to others."""
    subcommands: Any
    """The subcommands, to add one more."""

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        """As in jsonargparse, which makes its parsers for subclasses by it too."""
        cls = args[0] if args else kwargs.get("class_type")
        nested_key = args[1] if len(args) > 1 else kwargs.get("nested_key")
        if self.made is not None and nested_key not in self.made:
            kwargs["instantiate"] = False
        added: list[str] = super().add_class_arguments(*args, **kwargs)
        for name in KINDS:
            destination = name if nested_key is None else f"{nested_key}.{name}"
            for action in self._actions:
                if action.dest == destination and destination in added:
                    self._start_from_rules_of(cls, action, name)
        return added

    def _start_from_rules_of(self, cls: Any, action: Any, name: str) -> None:
        """Let single rules change, and begin with those of the class where the argument is not given."""
        action.__class__ = _RulesAction
        rules = getattr(cls, name, None)
        plain = plain_rules(rules)
        action.rules, action.kind = plain, KINDS[name]
        # Rules with classes or predicates stay where they are unless one is changed: text stands for these less well.
        if action.default is None and isinstance(rules, Mapping) and _parsed(rules, name) == _parsed(plain, name):
            self.set_defaults({action.dest: plain})

    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        """As in jsonargparse."""
        self.subcommands = super().add_subcommands(*args, **kwargs)
        return self.subcommands

    def link_arguments(
        self, source: Any, target: str, compute_fn: Any = None, apply_on: Any = "parse", **kwargs: Any
    ) -> Any:
        """As in jsonargparse."""
        if apply_on == "instantiate":
            sources = (source,) if isinstance(source, str) else source
            self.linked |= {path.partition(".")[0] for path in sources}
        return super().link_arguments(source, target, compute_fn, apply_on, **kwargs)


@functools.cache
def _with_rules(parser_class: Any) -> Any:
    """The parser class, able to change single rules."""
    if parser_class is LightningArgumentParser:
        return _RulesParser
    return type(parser_class.__name__, (_RulesParser, parser_class), {})


def _parsed(rules: Any, name: str) -> Any:
    """The rules as objects, None where they are none."""
    try:
        return parse_as(rules, KINDS[name])
    except (TypeError, ValueError):
        return None


def _exit_with(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _override_rule(rules: Any, key: str, value: Any, kind: type[Rule] = DecayRule) -> dict[str, Any]:
    """A mapping of rules with one rule, or one field of a rule, changed or added; the others and the order stay.

    Args:
        rules: the rules so far, or None.
        key: the key of a rule, or that and a field after a dot, ``options.lr`` and the like included; ``stage_1`` is
            the first one of a list of schedules; or an argument of a preset.
        value: the new strength, the new rule, or the new value of the field.
        kind: the kind of rules that they are.

    Raises:
        TypeError: for rules that are not a mapping, or a stage that a list does not have.

    >>> _override_rule({"no_decay": {"params": "*.bias", "weight_decay": 0.0}, "head.*": 0.1}, "head.*", 0.2)
    {'no_decay': {'params': '*.bias', 'weight_decay': 0.0}, 'head.*': 0.2}
    >>> _override_rule({"no_decay": {"params": "*.bias", "weight_decay": 0.0}}, "no_decay.max_ndim", 1)
    {'no_decay': {'params': '*.bias', 'weight_decay': 0.0, 'max_ndim': 1}}
    >>> _override_rule("timm", "weight_decay", 0.05)
    {'preset': 'timm', 'weight_decay': 0.05}
    """
    if isinstance(rules, str):
        rules = {"preset": rules}
    if rules is not None and not isinstance(rules, Mapping):
        raise TypeError(
            f"rule {key!r} cannot be changed alone: these rules are a {type(rules).__name__}, {rules!r}; write them as "
            "a mapping, or pass all of them"
        )
    rules = rules or {}
    name, path = _split_key(key, rules, kind)
    before = rules.get(name)
    alone = kind.FIRST[0]
    if (is_schedule(before) or is_list(before)) and (not path or path[0] in field_names(kind)):
        before = {alone: before} if path else None  # a strength like a number
    if is_list(before):
        return {**rules, name: _with_field(before, path, value)}
    if path or (isinstance(before, Mapping) and not isinstance(value, Mapping)):
        if not isinstance(before, Mapping):
            before = {} if before is None else {alone: before}
        if before and path[:1] != ["params"] and path[:1] and path[0] in SELECTORS and SELECTORS.isdisjoint(before):
            before = {"params": name, **before}  # a key is a pattern only while there is no other selector
        value = _with_field(before, path or [alone], value)
    return {**rules, name: value}


def _split_key(key: str, rules: Mapping[str, Any], kind: type[Rule]) -> tuple[str, list[str]]:
    """The key of a rule, and the path to a field of it where there is one; patterns hold dots themselves."""
    if key in rules:
        return key, []
    parts = key.split(".")
    # The longest key first: of `head` and `head.*`, `head.*.group` is about the second.
    splits = [(".".join(parts[:end]), parts[end:]) for end in range(len(parts) - 1, 0, -1)]
    for name, path in splits:
        # What follows the name of a rule with fields is a field, right or wrong.
        is_of_it = isinstance(rules.get(name), Mapping) or (is_list(rules.get(name)) and _STAGE.fullmatch(path[0]))
        if name in rules and (_is_field(path, kind) or is_of_it):
            return name, path
    return next(((name, path) for name, path in splits if _is_field(path, kind)), (key, []))


def _is_field(path: Sequence[str], kind: type[Rule]) -> bool:
    return path[0] == "options" or (len(path) == 1 and path[0] in field_names(kind))


def _with_field(held: Any, path: Sequence[str], value: Any) -> Any:
    """A rule as a mapping, with the field at a path changed; one strength, or unit, takes the place of the other."""
    name, *rest = path
    if is_list(held) and _STAGE.fullmatch(name):
        index = int(name.removeprefix("stage_")) - 1
        if not 0 <= index < len(held):
            raise TypeError(f"there is no {name}: the list has stages 1 to {len(held)}")
        return [*held[:index], _with_field(held[index], rest, value) if rest else value, *held[index + 1 :]]
    rule = held if isinstance(held, Mapping) else {}
    if rest:
        value = _with_field(rule.get(name), rest, value)
    others = {other for pair in _INSTEAD if name in pair for other in pair} - {name}
    return {**{known: old for known, old in rule.items() if known not in others}, name: value}


def _value(option: str, text: Any) -> Any:
    """The value of an option of the command line."""
    # A slice needs no quotes here, though YAML takes 10:20 for the number 620 and 32000: for a mapping.
    is_rows = option.endswith(".rows") and isinstance(text, str)
    return text if is_rows and all(map(is_slice, text.split(","))) else _read(text)


def _with_slices(rules: Any) -> Any:
    """Rules in which a slice ends in a comma, which tells it from a number and a mapping.

    jsonargparse (4.39 to 4.53) reads text inside of what is not annotated anew, as YAML.
    """
    if isinstance(rules, dict):
        rows = rules.get("rows")
        found = {key: _with_slices(value) for key, value in rules.items()}
        is_text = isinstance(rows, str) and rows != PADDING and not rows.endswith(",")
        return {**found, "rows": f"{rows},"} if is_text else found
    return list(map(_with_slices, rules)) if isinstance(rules, list) else rules


def _read(text: Any) -> Any:
    """A value of the command line, as YAML."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:
            return float(value)  # 1e-3, which PyYAML takes for text
        except ValueError:
            pass
    return value
