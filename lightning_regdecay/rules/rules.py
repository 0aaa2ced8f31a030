"""Decay rules and lr rules: selectors, and what they set, checked. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from lightning_regdecay.rules.names import hint
from lightning_regdecay.rules.regions import (
    Blocks,
    ByBlock,
    Rows,
    block_from,
    blocks_from,
    names_of,
    region_text,
    rows_from,
)
from lightning_regdecay.rules.scalars import nonnegative_number, plain_number
from lightning_regdecay.rules.schedules import DecaySchedule, check_alone, schedule_from
from lightning_regdecay.rules.selectors import Rule, field_names
from lightning_regdecay.rules.stages import is_list
from lightning_regdecay.rules.toward import START, Toward, device_from, dtype_from, toward_from

OWN = "optimizer's"
"""In a table, what stays the optimizer's own."""


@dataclass(frozen=True, repr=False, eq=False)
class DecayRule(Rule):
    """Which parameters get which weight decay.

    All selectors given must hold; inside a list any one does. A rule without selectors takes every parameter.

    Args:
        weight_decay: λ, the coefficient as torch optimizers define it (the gradient of the L2 term is λ·w). A number or
            its text, as YAML reads ``1e-3``; a :class:`~lightning_regdecay.rules.schedules.DecaySchedule` or its fields
            where λ changes while training, or a list of these, one after another.
        decay_mult: instead of ``weight_decay``, a factor on the optimizer's own default. Exactly one of the two.
        of: beside ``decay_mult``, the name of another group of the same rules: the factor is on the λ of that one. A
            number is multiplied; of a schedule start and end are, of a timescale T is divided. One that goes by the lr
            goes by that of this rule's parameters.
        rows: take these rows of each tensor only: a slice as text (``"32000:"``, several with commas between), a list
            of numbers, a function ``rows(name, shape)`` that gives a mask with an entry for each row, or ``"padding"``
            for the padding row of an ``nn.Embedding``. What is left of the tensor is for the rules after it.
        blocks: what each tensor is made of, in order: sizes by name (``{"q": 768, "k": 768, "v": 768}``), names of
            equal blocks (``["q", "k", "v"]``), or a number of these. Each block is a group of its own, ``attn.q``.
            Sizes may leave the end of the tensor to the rules after it.
        block: take this one of the blocks only; without it, ``weight_decay`` may give each its own, by name.
        dim: the dimension that rows are counted along, and blocks lie along; 0 by default.
        toward: decay toward other weights than 0: the penalty is ½·λ·‖w - w₀‖². ``"start"`` for the weights as they are
            when training begins at step 0 (L2-SP, Li et al. 2018, arXiv 1802.01483; L2 Init, Kumar et al. 2023, arXiv
            2308.11958), the path of a file with a state dict, or a state dict by the names of the parameters.
        toward_dtype: the type that w₀ is kept in, such as ``"bfloat16"``; by default that of the parameter.
        toward_device: ``"cpu"`` to keep w₀ there; by default it is kept beside the parameter.
        params: glob(s) over the full parameter name. ``*`` crosses dots, case counts, the whole name must match; after
            ``re:`` comes a regular expression instead, which is searched.
        modules: class(es) of the module that owns the parameter, or glob(s) over the names of its class and base
            classes. A name with dots, such as ``"torch.nn.LayerNorm"``, is the class at that path.
        min_ndim: the least number of dimensions of the parameter as the user defined it.
        max_ndim: the largest number of dimensions, likewise.
        where: any other test, ``where(name, parameter, module) -> bool``; in code only, as text cannot hold it. Some
            tests go by name: ``"depthwise"`` for what a convolution with as many groups as input channels owns,
            ``"marked"`` for parameters that the model has marked (``parameter._no_weight_decay = True``, as Mamba, S4),
            ``"no_weight_decay"`` and ``"no_weight_decay_keywords"`` for what the model itself lists, by its methods of
            these names (see :func:`~lightning_regdecay.rules.presets.timm_rules`); ``"unexpected"`` is an error where a
            parameter passes all other selectors.
        group: the name of the group. Rules that share it and agree on strength and options form one group.
        lr_mult: a factor on the lr that the optimizer, or its param group, has at each step: what lr schedulers set is
            multiplied, too. 0 trains nothing.
        options: other options of the optimizer for this group, such as ``{"lr": 1e-4}``.
        optional: True for a rule, or some of its patterns and classes, that may find nothing in a model.

    Raises:
        TypeError: for a value of the wrong kind.
        ValueError: for a strength that is negative or not finite, both or neither strength, a bad pattern, rows and
            blocks at once.

    >>> DecayRule(0.05, params="encoder.*", min_ndim=2)
    DecayRule(0.05, params='encoder.*', min_ndim=2)
    >>> DecayRule(decay_mult=0.1, modules=["*Norm*", "_ConvNd"], group="slow")
    DecayRule(decay_mult=0.1, modules=['*Norm*', '_ConvNd'], group='slow')
    """

    KIND: ClassVar[str] = "decay rule"
    FIRST: ClassVar[tuple[str, ...]] = ("weight_decay", "decay_mult", "of")
    AGREED: ClassVar[tuple[str, ...]] = (*Rule.AGREED, "toward", "toward_dtype", "toward_device")

    weight_decay: float | DecaySchedule | None = None
    decay_mult: float | None = field(default=None, kw_only=True)
    of: str | None = field(default=None, kw_only=True)
    rows: str | Sequence[int] | Callable[..., Any] | None = field(default=None, kw_only=True)
    blocks: int | Sequence[str] | Mapping[str, int] | None = field(default=None, kw_only=True)
    block: str | None = field(default=None, kw_only=True)
    dim: int | None = field(default=None, kw_only=True)
    toward: Any = field(default=None, kw_only=True)
    toward_dtype: Any = field(default=None, kw_only=True)
    toward_device: Any = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        blocks = blocks_from(self.blocks)
        self._set(
            weight_decay=_strength(self.weight_decay, blocks, self.block),
            decay_mult=nonnegative_number("decay_mult", self.decay_mult),
            of=_other_group(self.of),
            rows=rows_from(self.rows),
            blocks=blocks,
            block=block_from(self.block, blocks),
            dim=_dim(self.dim),
            toward=toward_from(self.toward),
            toward_dtype=dtype_from(self.toward_dtype),
            toward_device=device_from(self.toward_device),
        )
        super().__post_init__()
        self._check_parts()
        if (self.weight_decay is None) == (self.decay_mult is None):
            given = "neither" if self.weight_decay is None else "both"
            raise ValueError(
                f"exactly one of weight_decay and decay_mult must be given, got {given}; "
                "write weight_decay=0.05, or decay_mult=0.5 for half the optimizer's own"
            )
        if self.of is not None and self.decay_mult is None:
            raise ValueError(
                f"of={self.of!r} says what decay_mult is a factor on, and there is none; write decay_mult=1 for the λ "
                "of that group as it is"
            )
        kind = getattr(self.weight_decay, "of_lr_times_lambda", None)
        if self.lr_mult == 0 and kind is not None:
            raise ValueError(f"a {kind} divides by the lr, which has no value at lr_mult=0; give λ as a number")

    def _check_parts(self) -> None:
        """Raise for what does not go with rows, blocks and a start."""
        if self.rows is not None and self.blocks is not None:
            raise ValueError("rows and blocks both say which part of a tensor is meant: give one of them")
        if self.dim is not None and not self.is_partial:
            raise TypeError("dim needs rows or blocks, which lie along it")
        if self.is_partial and (self.lr_mult is not None or self.options):
            given = "lr_mult" if self.lr_mult is not None else f"the options {sorted(self.options)}"
            raise ValueError(
                f"{given} cannot be given for a part of a tensor, of which only λ can differ; let an lr rule set them "
                f"for the whole tensor: lr_rules={{{self.selectors_text!r}: …}}"
            )
        if self.toward is None and (self.toward_dtype is not None or self.toward_device is not None):
            raise TypeError("toward_dtype and toward_device say how a start is kept: give toward, too")

    @property
    def is_partial(self) -> bool:
        """Whether it takes a part of each tensor."""
        return self.rows is not None or self.blocks is not None

    @property
    def given_rows(self) -> Rows | None:
        """``rows``, which a user may give in many forms."""
        return self.rows  # type: ignore[return-value]

    @property
    def given_blocks(self) -> Blocks | None:
        """``blocks``, likewise."""
        return self.blocks  # type: ignore[return-value]

    @property
    def start(self) -> Toward | None:
        """``toward``, likewise."""
        return self.toward  # type: ignore[no-any-return]

    def one_by_one(self) -> list[Any]:
        """A rule for each of its blocks; itself where it takes one thing only.

        >>> for rule in DecayRule({"q": 0.1, "v": 0.0}, params="qv", blocks=["q", "v"], group="a").one_by_one():
        ...     print(rule)
        DecayRule(0.1, params='qv', group='a.q', blocks=['q', 'v'], block='q')
        DecayRule(0.0, params='qv', group='a.v', blocks=['q', 'v'], block='v')
        """
        if self.given_blocks is None or self.block is not None:
            return [self]
        strengths = self.weight_decay
        return [
            replace(
                self,
                weight_decay=strengths[name] if isinstance(strengths, ByBlock) else strengths,
                block=name,
                group=name if self.group is None else f"{self.group}.{name}",
            )
            for name in names_of(self.given_blocks)
        ]

    @property
    def part_text(self) -> str:
        """What it takes of each tensor, in a few words; empty for all of it."""
        return region_text(self.given_rows, self.given_blocks, self.block, self.dim)

    @property
    def strength_text(self) -> str:
        """The strength in words that fit a table cell: a number, or a factor on the optimizer's own or another group's.

        >>> DecayRule(1e-3).strength_text, DecayRule(decay_mult=0.5).strength_text
        ('0.001', "0.5 x optimizer's")
        >>> DecayRule(0.01, toward="start").strength_text
        '0.01 toward start'
        """
        if isinstance(self.weight_decay, DecaySchedule):
            text = self.weight_decay.text
        elif isinstance(self.weight_decay, ByBlock):
            text = "by block"
        elif self.decay_mult is None:
            text = f"{self.weight_decay:g}"
        else:
            text = f"{self.decay_mult:g} x {OWN if self.of is None else f'that of {self.of}'}"
        return text if self.toward is None else f"{text} toward {START if self.toward == START else 'given'}"


@dataclass(frozen=True, repr=False, eq=False)
class LrRule(Rule):
    """Which parameters get which learning rate, and other options of the optimizer; crosses the decay rules.

    Goes into ``lr_rules``, beside ``decay_rules`` and in the same grammar. The first lr rule that takes a parameter
    gives its lr, the first decay rule its λ, each whatever the other does; a group is what one of each has taken.

    Args:
        lr: the lr of the group, where the optimizer is built over the groups; lr schedulers begin with it, and those
            that set the lr of all groups take its place. A number or its text.
        lr_mult: instead of ``lr``, a factor on the lr that the optimizer, or its param group, has at each step: what
            lr schedulers set is multiplied, too. 0 trains nothing.
        params: as in :class:`DecayRule`, like all selectors.
        modules: likewise.
        min_ndim: likewise.
        max_ndim: likewise.
        where: likewise.
        group: the name of the group, which comes before that of the decay rule: ``head.bias``.
        options: other options of the optimizer, such as ``{"betas": (0.9, 0.95)}``.
        optional: True for a rule, or some of its patterns and classes, that may find nothing in a model.

    Raises:
        TypeError: for a value of the wrong kind.
        ValueError: for a value that is negative or not finite, both ``lr`` and ``lr_mult``, nothing to set.

    >>> LrRule(lr_mult=0.1, params="backbone.*")
    LrRule(lr_mult=0.1, params='backbone.*')
    """

    KIND: ClassVar[str] = "lr rule"
    FIRST: ClassVar[tuple[str, ...]] = ("lr", "lr_mult")

    lr: float | None = None

    def __post_init__(self) -> None:
        self._set(lr=nonnegative_number("lr", self.lr))
        super().__post_init__()
        if self.lr is not None and (self.lr_mult is not None or "lr" in self.options):
            raise ValueError(
                "lr, lr_mult and the option lr say the same thing: give one of them; lr=1e-4 is the lr itself, "
                "lr_mult=0.1 a tenth of the optimizer's"
            )
        if self.lr is None and self.lr_mult is None and not self.options:
            raise ValueError(
                "nothing is set; write lr=1e-4 for the lr itself, lr_mult=0.1 for a tenth of the optimizer's, or give "
                "options"
            )

    @property
    def all_options(self) -> dict[str, Any]:
        """The options that the group has in the optimizer, ``lr`` among them."""
        return dict(self.options) if self.lr is None else {"lr": self.lr, **self.options}


def _strength(value: Any, blocks: Blocks | None, block: Any) -> Any:
    """A strength, or one for each block."""
    if blocks is None or not isinstance(value, Mapping) or is_schedule(value):
        return strength_from(value)
    given = {str(plain_number(name)): strength for name, strength in value.items()}
    if block is not None:
        raise TypeError(f"block={block!r} has one weight_decay, got one for each of {list(given)}")
    names = names_of(blocks)
    for name in given:
        if name not in names:
            raise ValueError(f"weight_decay is given for an unknown block {name!r}; {hint(name, names)}")
    for name in names:
        if name not in given:
            raise ValueError(f"weight_decay is not given for block {name!r}; give each of {', '.join(names)} its own")
    return ByBlock({name: strength_from(given[name]) for name in names})


def _dim(value: Any) -> int | None:
    number = plain_number(value)
    if number is None or (isinstance(number, int) and not isinstance(number, bool)):
        return number
    raise TypeError(f"dim must be the number of a dimension, got {value!r}")


def _other_group(value: Any) -> str | None:
    if value is not None and not (isinstance(value, str) and value):
        raise TypeError(f"of must be the name of a group of the same rules (text), got {value!r}")
    return value


def is_schedule(value: Any) -> bool:
    """Whether a mapping holds the fields of a schedule, not those of a rule."""
    return isinstance(value, Mapping) and "schedule" in value


def strength_from(value: Any) -> float | DecaySchedule | None:
    """λ as users give it: a number, its text, a schedule or its fields, a list of schedules."""
    if isinstance(value, DecaySchedule):
        return check_alone(value)
    if is_list(value):
        return DecaySchedule("stages", stages=value)
    if not isinstance(value, Mapping):
        return nonnegative_number("weight_decay", value)
    if not is_schedule(value):
        raise TypeError(
            f"weight_decay must be a number or a schedule, such as {{schedule: cosine, start: 0.04, end: 0.4}}, got "
            f"{dict(value)!r}"
        )
    return check_alone(schedule_from(value, beside=field_names(DecayRule)))
