"""Rules × parameters → groups, and the table that explains them."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import torch
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_regdecay.groups.matching import Matcher, first_takers, listed, nearest_names
from lightning_regdecay.groups.parameters import ModelParameter, class_of, model_parameters
from lightning_regdecay.groups.pieces import Piece, pieces_from, pieces_of, shares_of
from lightning_regdecay.groups.plots import plot_groups
from lightning_regdecay.groups.regions import Region
from lightning_regdecay.groups.review import review
from lightning_regdecay.groups.rows import TABLE_HEADER, bytes_text, numel_of, table_row, total_row
from lightning_regdecay.groups.shards import original_shape
from lightning_regdecay.groups.tables import Lines, Table, Tabular
from lightning_regdecay.rules.crossing import Pair, RuleSet, Treatment, parse_rule_set
from lightning_regdecay.rules.forms import DecayRules, LrRules
from lightning_regdecay.rules.names import hint, safe_name, unique_name
from lightning_regdecay.rules.rules import OWN, DecayRule, LrRule
from lightning_regdecay.rules.scalars import nonnegative_number, true_or_false
from lightning_regdecay.rules.schedules import LR_MULT_KEY, DecaySchedule, scheduled_param_group
from lightning_regdecay.rules.selectors import Rule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES_KEY = "decay_params"
"""Where a param group of ours holds the names of its parameters. Not in torch's own ``param_names``: beside groups that
have these torch (2.6 to 2.13) takes none that has not."""

ON_META = (
    "group {group!r} holds parameters on the meta device, which no step would ever move; build the groups, and the "
    "optimizer, after the model has its memory (after to_empty or configure_model)"
)


@dataclass(frozen=True, repr=False)
class DecayGroup:
    """The trainable parameters that one rule took, under one name; one group is one optimizer param group.

    Args:
        name: letters, digits, ``_``, ``-`` and ``.`` only, unique among the groups of a model.
        rule: the rule that took the parameters (the first, where several rules share the group), or None for the group
            ``default`` of what no rule took.
        params: parameter name to parameter, in the order of the model.
        model: refers to the model.
        lr_rule: the lr rule that took the parameters, None where none did.
        regions: by the name of a parameter, the part of it that is in the group, where that is not all of it.
    """

    name: str
    rule: DecayRule | None
    params: Mapping[str, nn.Parameter]
    model: Callable[[], nn.Module | None] = field(default=lambda: None, compare=False)
    lr_rule: LrRule | None = None
    regions: Mapping[str, Region] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"DecayGroup({self.name!r}, {len(self.params)} tensors, {self.numel} parameters, "
            f"weight_decay={self.strength_text})"
        )

    @property
    def numel(self) -> int:
        """The number of scalar parameters, of the whole parameters where they are sharded."""
        return numel_of(self.params.values(), map(self.regions.get, self.params))

    @property
    def strength_text(self) -> str:
        """The strength in words that fit a table cell."""
        return self.treatment.strength_text

    @property
    def start_memory(self) -> int:
        """The bytes that are kept of the weights that it decays toward, over all processes; 0 where that is 0."""
        if self.rule is None or self.rule.toward is None:
            return 0
        own = self.rule.toward_dtype
        sizes = ((p, p.element_size() if own is None else getattr(torch, own).itemsize) for p in self.params.values())
        return sum(original_shape(parameter).numel() * size for parameter, size in sizes)

    @property
    def treatment(self) -> Treatment:
        """What its rules do."""
        return Treatment(self.rule, self.lr_rule)

    def as_param_group(self, weight_decay: float | None = None, *, lr: float | None = None) -> dict[str, Any]:
        """The group as ``torch.optim.Optimizer`` takes it, with its ``name`` and the names of its parameters.

        Args:
            weight_decay: the optimizer's own weight decay, which a rule with ``decay_mult`` multiplies. A group without
                a rule has no ``weight_decay`` here, so that the optimizer fills in its own.
            lr: the optimizer's own lr, which a rule with ``lr_mult`` multiplies: here once, so that an lr scheduler
                that sets the lr of all groups overrides it.

        Raises:
            TypeError: for a weight decay or an lr that is no number.
            ValueError: for one below 0, or not given where a rule has a factor on it; for parameters on the meta
                device, or in whose place the model has others by now; for a group that holds parts of tensors, or
                decays toward a start, of which an optimizer by itself knows nothing.

        >>> groups = build_decay_groups(nn.Linear(2, 1), {"bias": 0.0})
        >>> [sorted(group.as_param_group()) for group in groups]
        [['decay_params', 'name', 'params', 'weight_decay'], ['decay_params', 'name', 'params']]
        """
        if any(parameter.is_meta for parameter in self.params.values()):
            raise ValueError(ON_META.format(group=self.name))
        _refuse_stale([self], self.model())
        if self.regions or self.start_memory:
            what = "holds parts of tensors" if self.regions else "decays toward a start"
            raise ValueError(
                f"group {self.name!r} {what}, which no param group can say: put the rules in force in an optimizer "
                "over the parameters, by apply_decay_rules(optimizer, model, rules), or let WeightDecayMixin build it"
            )
        if not isinstance(weight_decay, Tensor):
            weight_decay = nonnegative_number("weight_decay", weight_decay)
        group = self.as_param_group_of_own_strength()
        if self.rule is not None and self.rule.decay_mult is not None:
            if weight_decay is None:
                raise ValueError(
                    f"group {self.name!r} has decay_mult={self.rule.decay_mult:g}, a factor on the optimizer's own "
                    "weight decay, which is not known here; pass it: as_param_group(weight_decay=0.1)"
                )
            group["weight_decay"] = self.rule.decay_mult * weight_decay
        lr_mult = self.treatment.lr_mult
        if lr_mult is not None:
            lr = lr if isinstance(lr, Tensor) else nonnegative_number("lr", lr)
            if lr is None:
                raise ValueError(
                    f"group {self.name!r} has lr_mult={lr_mult:g}, a factor on the optimizer's own lr, which is not "
                    "known here; pass it: as_param_group(lr=1e-3)"
                )
            group["lr"], group[LR_MULT_KEY] = lr_mult * lr, lr_mult
        return group

    def as_param_group_of_own_strength(self) -> dict[str, Any]:
        """The same without ``weight_decay`` and ``lr`` where these are factors on the optimizer's, on any device."""
        whole = {name: parameter for name, parameter in self.params.items() if name not in self.regions}
        group = {"params": list(whole.values()), NAMES_KEY: list(whole), "name": self.name}
        strength = None if self.rule is None else self.rule.weight_decay
        if isinstance(strength, DecaySchedule):
            group |= scheduled_param_group(strength)
        elif strength is not None:
            group["weight_decay"] = strength
        # Copies, as torch's lr schedulers write into an lr that is a tensor.
        return {**group, **copy.deepcopy(self.treatment.options)}


class DecayGroups(Tabular, list[DecayGroup]):
    """The groups of a model: a list that prints as a table and explains any one parameter."""

    def __init__(
        self,
        groups: Iterable[DecayGroup],
        parameters: Sequence[ModelParameter],
        rule_set: RuleSet,
        cut: Mapping[str, tuple[Piece, ...]],
    ) -> None:
        super().__init__(groups)
        self._parameters = parameters
        self.rule_set = rule_set
        """The rules that the groups were built by."""
        self.cut = cut
        """The pieces of parameters that are in several groups, by name."""

    @property
    def together(self) -> dict[tuple[Pair, ...], str]:
        """Groups that have pieces of the same tensors, and the name of the param group that these are in."""
        names: dict[tuple[Pair, ...], str] = {}
        taken = set(self.rule_set.names.values())
        for pieces in self.cut.values():
            pairs = tuple(piece.pair for piece in pieces)
            if pairs not in names:
                names[pairs] = together(self.rule_set, pairs, taken)
                taken.add(names[pairs])
        return names

    @property
    def table(self) -> Table:
        """The table, a row per group and one for all."""
        return Table(TABLE_HEADER, self.rows())

    @overload
    def __getitem__(self, key: SupportsIndex | str) -> DecayGroup: ...

    @overload
    def __getitem__(self, key: slice) -> list[DecayGroup]: ...

    def __getitem__(self, key: Any) -> Any:
        """A group by its name, or by its number as in any list."""
        if not isinstance(key, str):
            return super().__getitem__(key)
        for group in self:
            if group.name == key:
                return group
        raise KeyError(f"no group is called {key!r}; {hint(key, self.names)}")

    @property
    def names(self) -> list[str]:
        """The names of the groups, in order."""
        return [group.name for group in self]

    @property
    def rules(self) -> tuple[DecayRule, ...]:
        """The decay rules that the groups were built by, in order."""
        return self.rule_set.decay

    @property
    def lr_rules(self) -> tuple[LrRule, ...]:
        """The lr rules that the groups were built by, in order."""
        return self.rule_set.lr

    def as_param_groups(self, weight_decay: float | None = None, *, lr: float | None = None) -> list[dict[str, Any]]:
        """The groups as ``torch.optim.Optimizer`` takes them, see :meth:`DecayGroup.as_param_group`."""
        _refuse_stale(self, self[0].model() if self else None)
        return [replace(group, model=lambda: None).as_param_group(weight_decay, lr=lr) for group in self]

    def own_param_groups(self) -> list[tuple[DecayGroup | None, dict[str, Any]]]:
        """The param groups of an optimizer that is built over these groups, each with the group that it is.

        Tensors that are in several groups are in param groups without one.
        """
        found: list[tuple[DecayGroup | None, dict[str, Any]]] = [
            (group, group.as_param_group_of_own_strength())
            for group in self
            if len(group.regions) < len(group.params) or not group.params
        ]
        by_name = {p.name: p.parameter for p in self._parameters}
        for pairs, label in self.together.items():
            names = [name for name, pieces in self.cut.items() if tuple(piece.pair for piece in pieces) == pairs]
            options = copy.deepcopy(self.rule_set.treatments[pairs[0]].options)
            params = [by_name[name] for name in names]
            found.append((None, {"params": params, NAMES_KEY: names, "name": label, **options}))
        return found

    def rows(self) -> list[list[str]]:
        """The cells of the table, a row per group and one for all."""
        rows = []
        for group in self:
            treatment = group.treatment
            text, strength = self.rule_set.text_of(treatment.pair), treatment.strength_text
            if group.start_memory:
                strength = f"{strength} ({bytes_text(group.start_memory)})"
            regions = map(group.regions.get, group.params)
            rows.append(table_row(group.name, text, group.params.values(), strength, treatment.lr_text, regions))
        every = {name: parameter for group in self for name, parameter in group.params.items()}
        return [*rows, total_row(every.values())]

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Plot which parameter is in which group: a row per module, a cell per parameter in the colour of its λ.

        Layers whose parameters are in the same groups share a row, ``layers.[0-11].mlp  (12)``. Dots mark a λ on a
        schedule (in the colour of its highest), stripes one that goes by the optimizer's own.

        Args:
            ax: matplotlib axes to draw on; by default a new figure.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: without matplotlib.
        """
        return plot_groups(self, self._parameters, ax)

    def explain(self, name: str) -> str:
        """Which rule took a parameter, and why each earlier rule did not.

        Args:
            name: the name of a parameter; any of its names where it is tied.

        Raises:
            TypeError: for a name that is no text.
            KeyError: where the model has no parameter of that name.

        >>> print(build_decay_groups(nn.Linear(2, 1), {"bias": 0.0, "*": 0.1}).explain("weight"))
        weight (2 dimensions, in Linear) is in group 'rest', weight_decay 0.1
          rule 1 'bias' does not take it: its name does not match 'bias'
          rule 2 '*' takes it
        """
        if not isinstance(name, str):
            raise TypeError(f"name must be the name of a parameter (text), got {type(name).__name__}")
        found = [p for p in self._parameters if name in p.names]
        if not found:
            names = [known for p in self._parameters for known in p.names]
            raise KeyError(f"the model has no parameter {name!r}; nearest: {listed(nearest_names(name, names))}")
        return Lines("\n".join(map(self._explain, found)))  # of a weight that is made of two tensors, both

    def _explain(self, parameter: ModelParameter) -> str:
        owners = sorted({class_of(place.module).__name__ for place in parameter.places})
        head = f"{' = '.join(parameter.names)} ({parameter.ndim} dimensions, in {', '.join(owners)})"
        groups = [group for group in self if parameter.name in group.params]
        if not groups:
            return f"{head} was frozen (requires_grad=False) when the groups were made: it is in none"
        lines = []
        for group in groups:
            treatment = group.treatment
            lr = "" if treatment.lr_text == OWN else f", lr {treatment.lr_text}"
            region = group.regions.get(parameter.name)
            part = "" if region is None else f" {region.text},"
            lines.append(f"{part} in group {group.name!r}, weight_decay {treatment.strength_text}{lr}")
        lines = [f"{head} is{lines[0]}"] if len(lines) == 1 else [f"{head} is", *(f" {line}" for line in lines)]
        takers = {rule.group for group in groups if (rule := group.rule) is not None}
        lines += _explained(self.rules, parameter, "rule", "it keeps the optimizer's own weight decay", takers)
        if self.lr_rules:
            lines += _explained(self.lr_rules, parameter, "lr rule", "it keeps the optimizer's own lr")
        return "\n".join(lines)


def _explained(
    rules: Sequence[Rule],
    parameter: ModelParameter,
    kind: str,
    otherwise: str,
    takers: Collection[str | None] | None = None,
) -> list[str]:
    """Which of some rules took a parameter, and why each earlier one did not, a line each.

    Args:
        rules: the rules, in order.
        parameter: the parameter.
        kind: what to call them.
        otherwise: what becomes of what none takes.
        takers: the groups of those that took some of it, where one may take a part.
    """
    lines, is_whole, is_left = [], True, takers is None or len(takers) > 0
    for number, rule in enumerate(rules, start=1):
        label = f"  {kind} {number} {rule.selector_text!r}"
        reason = Matcher(rule).mismatch(parameter)
        if reason is not None:
            lines.append(f"{label} does not take it: {reason}")
        elif takers is not None and rule.group not in takers:
            lines.append(f"{label} takes nothing of it")
        elif rule.is_partial:
            lines.append(f"{label} takes that part of it")
            is_whole = False
        else:
            lines.append(f"{label} takes {'it' if is_whole else 'what is left of it'}")
            return lines
    return lines if is_left and not is_whole else [*lines, f"  no {kind} takes it: {otherwise}"]


def build_decay_groups(
    module: nn.Module, rules: DecayRules, *, lr_rules: LrRules | None = None, strict: bool = True
) -> DecayGroups:
    """Put every trainable parameter of a model into one group, by the first rule that takes it.

    Works on any module, without a Trainer. Names, owners and dimensions are those of the model as the user wrote it:
    what ``torch.compile``, activation checkpointing or DDP wrap around it changes nothing. A tied parameter counts
    once, under its first name, and a rule that takes any of its names takes it. Frozen parameters are left out.

    Args:
        module: the model; on the meta device too.
        rules: a mapping or list of rules, see :class:`DecayRule`.
        lr_rules: a mapping or list of lr rules, see :class:`LrRule`, which cross the others: a group is then what one
            rule of each kind has taken, and called by both, ``head.bias``.
        strict: False turns the errors about rules that take nothing into warnings.

    Returns:
        A list of the groups in the order of the rules; last, where any are left, the group ``default`` of what no rule
        took. It prints as a table, and ``.explain(name)`` tells which rule took a parameter.

    Raises:
        TypeError: for rules of an unknown form, a module that is none, or a ``strict`` that is not True or False.
        RuntimeError: where a predicate of the user fails.
        ValueError: for a rule that takes nothing (a typo, or earlier rules took it all), a pattern or class name in a
            list that matches nothing, an uninitialised lazy parameter, a model with nothing to train.

    >>> print(build_decay_groups(nn.Linear(3, 2), {"*bias": 0.0, "*": "5e-2"}))
    group  rule   tensors  parameters  weight_decay           lr
    bias   *bias        1           2             0  optimizer's
    rest   *            1           6          0.05  optimizer's
    total               2           8
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}; pass the model itself")
    strict = true_or_false("strict", strict)
    rule_set = parse_rule_set(rules, lr_rules)
    parameters = model_parameters(module)
    trainable = [p for p in parameters if p.parameter.requires_grad]
    if not trainable:
        frozen = f"all its {len(parameters)} parameters are frozen" if parameters else "it has no parameters"
        raise ValueError(f"{type(module).__name__} has nothing to train: {frozen}")

    decay, lr = [Matcher(rule) for rule in rule_set.decay], [Matcher(rule) for rule in rule_set.lr]
    shares, lr_takers = shares_of(decay, trainable), first_takers(lr, trainable)
    problems: list[str] = []
    remarks: list[str] = []
    review(module, decay, parameters, trainable, [{share.taker for share in one} for one in shares], problems, remarks)
    review(module, lr, parameters, trainable, [{taker} for taker in lr_takers], problems, remarks)
    if problems and strict:
        raise ValueError("\n".join(problems))
    for line in problems + remarks:
        rank_zero_warn(line)

    every = pieces_from(rule_set, trainable, shares, lr_takers)
    members: dict[Pair, dict[str, nn.Parameter]] = {pair: {} for pair in rule_set.names}
    regions: dict[Pair, dict[str, Region]] = {pair: {} for pair in rule_set.names}
    for parameter, pieces in zip(trainable, every):
        for pair, region in pieces:
            members[pair][parameter.name] = parameter.parameter
            if region is not None:
                regions[pair][parameter.name] = region
    treatments, model = rule_set.treatments, weakref.ref(module)
    others = [p for p in parameters if not p.parameter.requires_grad]  # which may train later
    for pair in dict.fromkeys(piece.pair for pieces in [*every, *pieces_of(rule_set, others)] for piece in pieces):
        treatments[pair].check()
    groups = []
    for pair, name in rule_set.names.items():
        if members[pair]:
            treated = treatments[pair]
            groups.append(DecayGroup(name, treated.rule, members[pair], model, treated.lr_rule, regions[pair]))
    cut = {parameter.name: pieces for parameter, pieces in zip(trainable, every) if len(pieces) > 1}
    return DecayGroups(groups, parameters, rule_set, cut)


def together(rules: RuleSet, pairs: Iterable[Pair], taken: Collection[str]) -> str:
    """The name of the param group of tensors that have pieces in several groups."""
    return unique_name(safe_name("-".join(rules.names[pair] for pair in pairs)), taken)


def _refuse_stale(groups: Iterable[DecayGroup], module: nn.Module | None) -> None:
    """Raise for groups with parameters that the model has no more."""
    if module is None:
        return
    own = {id(parameter) for _, parameter in module.named_parameters()}
    for group in groups:
        for name, parameter in group.params.items():
            if id(parameter) not in own:
                raise ValueError(
                    f"group {group.name!r} holds {name!r}, in whose place the model has another parameter by now, or "
                    "none (given memory by to_empty, loaded with assign=True, a layer replaced), so that no step would "
                    "move it; build the groups after that"
                )
