"""λ and lr by the depth of a layer, for models that repeat layers, as rules in plain data. Knows no model."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from lightning_regdecay.rules.scalars import nonnegative_number, positive_number, true_or_false, whole_number

PlainRules: TypeAlias = list[dict[str, Any]]

STEM = (
    r"re:(^|\.)((cls|class|dist|mask|reg|register)_tokens?|pos(ition(al)?)?_embed\w*|patch_embed\w*|embeddings?|embedder|"
    r"embed_(tokens|in|positions)|\w+_embeddings?|wte|wpe|conv_proj|stem|feature_(extractor|projection)|norm_pre|ln_pre|"
    r"pre_layr?norm)(\.|$)|^\D*(^|\.)(conv[12]|bn1)\."
)
"""What comes before the first layer: tokens, embeddings, stems of transformers, ResNets and ConvNeXts."""
_FINAL_NORM = r"re:^(?!heads?\.|classifier\.)([A-Za-z_]\w*\.)?norm\."
_FRONT = r"re:^([^.]*[^.\d][^.]*\.)*?"
"""Names above a layer, of which none is a number."""
_USUAL = _FRONT + r"((blocks?|layers?|h|resblocks)\.|encoder_layer_){}\."
"""A layer by the usual names, of which the first that has a number counts."""
_DOWNSAMPLING = r"downsampl\w*\."
"""What brings a stage down to its size, and counts as a part of its first layer."""
_MOST_LAYERS = 1000
_OTHER = r"(?!(?:{})(?!\d))\d+"
"""A number other than some."""


def layerwise_lr_rules(
    depths: Any,
    *,
    layer_decay: Any = 0.75,
    min_lr_mult: Any = 0.0,
    layers: Any = None,
    stem: Any = STEM,
    norm_with_layers: bool = False,
) -> PlainRules:
    """A factor on the lr that falls toward the input: layer_decay^(n - i) for layer i of n, as in BEiT and timm.

    What comes before the layers has layer_decay^(n + 1), what comes after them 1. Source: ``get_num_layer_for_vit`` in
    `BEiT <https://github.com/microsoft/unilm/blob/master/beit/optim_factory.py>`_, ``param_groups_layer_decay`` in
    `timm <https://github.com/huggingface/pytorch-image-models/blob/main/timm/optim/_param_groups.py>`_.

    Args:
        depths: how many layers the model has, or how many in each of its stages, as ``[3, 4, 6, 3]``. Other numbers
            than the model has are an error when the groups are made.
        layer_decay: the factor from a layer to the one before it.
        min_lr_mult: the least factor, timm's ``min_scale``.
        layers: the pattern of a layer's parameters with ``{}`` in the place of its number, ``"encoder.block.{}.*"``;
            with ``{}`` for stage and layer where there are stages, or a list of a pattern for each stage. By default
            the usual names: ``blocks.{}``, ``layers.{}``, ``layer.{}``, ``h.{}``, ``block.{}``, of which the first that
            has a number counts, so that layers of an encoder and a decoder share theirs; for stages
            ``stages.{}.blocks.{}`` and the like, ``layer1.0`` and the like (ResNet).
        stem: patterns of what comes before the layers; by default tokens, embeddings and the usual stems. None for
            nothing.
        norm_with_layers: True to have the norm after the layers (``norm``) with the last of them, as timm does; in BEiT
            it is with the head.

    Raises:
        TypeError: for an argument of the wrong kind.
        ValueError: for one out of range, or a pattern without ``{}``.

    >>> for rule in layerwise_lr_rules(2, layer_decay=0.5, layers="blocks.{}.*", stem="embed.*")[1:]:
    ...     print(rule)
    {'params': 'blocks.0.*', 'lr_mult': 0.25, 'group': 'layer_0'}
    {'params': 'blocks.1.*', 'lr_mult': 0.5, 'group': 'layer_1'}
    {'params': 'embed.*', 'lr_mult': 0.125, 'group': 'stem', 'optional': True}
    """
    return [rule for _, rule in _by_depth(depths, layer_decay, min_lr_mult, layers, stem, norm_with_layers)]


def layerwise_rules(
    depths: Any,
    weight_decay: Any = None,
    *,
    layer_decay: Any = 0.75,
    strength_decay: Any = 1.0,
    min_lr_mult: Any = 0.0,
    layers: Any = None,
    stem: Any = STEM,
    norm_with_layers: bool = False,
) -> PlainRules:
    """λ and a factor on the lr by depth, where 1-D parameters and what the model lists do not decay, as in BEiT, timm.

    As :func:`layerwise_lr_rules`, each layer in two groups, ``layer_3`` and ``layer_3_no_decay``. For other rules of
    what decays, give that preset as ``lr_rules`` beside them instead.

    Args:
        depths: see there.
        weight_decay: λ of what decays.
        layer_decay: see there.
        strength_decay: the same for λ, 1 for one λ at every depth.
        min_lr_mult: see there.
        layers: see there.
        stem: see there.
        norm_with_layers: see there.

    Raises:
        TypeError: for an argument of the wrong kind.
        ValueError: for one out of range, a pattern without ``{}``, or a schedule with a ``strength_decay``.
    """
    by_depth = _by_depth(depths, layer_decay, min_lr_mult, layers, stem, norm_with_layers)
    decay = _factor("strength_decay", strength_decay)
    rules: PlainRules = []
    for power, rule in [*by_depth, (0, {"group": "top", "optional": True})]:
        if rule.get("where") == "unexpected":
            rules.append({**rule, "weight_decay": 0.0})
            continue
        kept = {"weight_decay": 0.0, "group": f"{rule['group']}_no_decay", "optional": True}
        for selector in ({"max_ndim": 1}, {"where": "no_weight_decay"}, {"where": "marked"}):
            rules.append({**rule, **selector, **kept})
        rules.append({**rule, **_strength(weight_decay, decay**power)})
    return rules


def _by_depth(
    depths: Any, layer_decay: Any, min_lr_mult: Any, layers: Any, stem: Any, norm_with_layers: Any
) -> list[tuple[int, dict[str, Any]]]:
    """The rules of the lr, each after the power of the factor that it has."""
    every, beyond = _layers(depths, layers)
    decay = _factor("layer_decay", layer_decay)
    least = nonnegative_number("min_lr_mult", min_lr_mult) or 0.0

    def lr_mult(power: int) -> float:
        return max(decay**power, least)

    beyond_rule = {"params": beyond, "where": "unexpected", "lr_mult": 1.0, "group": "layers", "optional": True}
    own = []
    for number, pattern in enumerate(every):
        power = len(every) - number
        own.append((power, {"params": pattern, "lr_mult": lr_mult(power), "group": f"layer_{number}"}))
    rules: list[tuple[int, dict[str, Any]]] = [(0, beyond_rule), *own]
    check_patterns("stem", stem or ())
    if stem:
        power = len(every) + 1
        rules.append((power, {"params": stem, "lr_mult": lr_mult(power), "group": "stem", "optional": True}))
    if true_or_false("norm_with_layers", norm_with_layers):
        power, last = own[-1]
        rules.append((power, {**last, "params": _FINAL_NORM, "optional": True}))
    return rules


def _strength(weight_decay: Any, factor: float) -> dict[str, Any]:
    if weight_decay is None:
        return {"decay_mult": factor}
    if factor == 1.0:
        return {"weight_decay": weight_decay}
    if not isinstance(weight_decay, (int, float, str)):
        raise ValueError(f"strength_decay is a factor on a number, got weight_decay={weight_decay!r}")
    return {"weight_decay": factor * (nonnegative_number("weight_decay", weight_decay) or 0.0)}


def _layers(depths: Any, layers: Any) -> tuple[list[str], list[str]]:
    """The pattern of every layer, from the first one on, and those of layers that there should not be."""
    counts = _counts(depths)
    if isinstance(counts, int):
        return _of_one(_template("layers", _USUAL if layers is None else layers, 1), counts)
    if layers is None:
        return _usual_stages(counts)
    if isinstance(layers, str):
        template = _template("layers", layers, 2)
        stages = [template.replace("{}", str(stage), 1) for stage in range(len(counts))]
    else:
        stages = [_template("layers", one, 1) for one in layers]
        if len(stages) != len(counts):
            raise ValueError(f"layers has {len(stages)} patterns, and depths {len(counts)} stages: give one for each")
    found = [_of_one(stage, count) for stage, count in zip(stages, counts)]
    return [layer for own, _ in found for layer in own], [pattern for _, other in found for pattern in other]


def _of_one(template: str, count: int) -> tuple[list[str], list[str]]:
    """The patterns of the layers that one template has, and that of others."""
    every = [template.replace("{}", str(number)) for number in range(count)]
    return every, [_as_regex(template).replace("{}", _other_than(range(count)))]


def _usual_stages(counts: Sequence[int]) -> tuple[list[str], list[str]]:
    """The patterns of the layers of stages by the usual names, and those of others."""
    every: list[str] = []
    beyond: list[str] = []
    for stage, count in enumerate(counts):
        start = rf"{_FRONT}((stages|layers)\.{stage}\.\w+\.|layer{stage + 1}\.)"
        every += [rf"{start}{number}\." for number in range(count)]
        every[-count] += rf"|{_FRONT.removeprefix('re:')}(stages|layers)\.{stage}\.{_DOWNSAMPLING}"
        beyond.append(rf"{start}{_other_than(range(count))}\.")
    other, of_resnet = _other_than(range(len(counts))), _other_than(range(1, len(counts) + 1))
    return every, [*beyond, rf"{_FRONT}((stages|layers)\.{other}|layer{of_resnet})\."]


def _other_than(known: Iterable[int]) -> str:
    """A regular expression for another number than some."""
    return _OTHER.format("|".join(map(str, known)))


def _as_regex(template: str) -> str:
    """A template as a regular expression."""
    if template.startswith("re:"):
        return template
    return "re:^" + fnmatch.translate(template.replace("{}", "NUMBER")).replace("NUMBER", "{}")


def _counts(depths: Any) -> int | list[int]:
    if isinstance(depths, Iterable) and not isinstance(depths, (str, Mapping)):
        counts = [_count(one) for one in depths]
        if not counts or None in counts:
            raise ValueError(f"depths must be the layers of each stage, such as [3, 4, 6, 3], got {depths!r}")
        return [one for one in counts if one is not None]
    count = _count(depths)
    if count is None:
        raise ValueError("depths must be given: how many layers the model has, or a list of how many in each stage")
    return count


def _count(value: Any) -> int | None:
    count = whole_number("depths", value, least=1)
    if count is not None and count > _MOST_LAYERS:
        raise ValueError(f"depths must be at most {_MOST_LAYERS}, a rule for each layer, got {value!r}")
    return count


def _template(name: str, value: Any, count: int) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a pattern with {{}} in the place of the number, got {value!r}")
    if value.count("{}") != count:
        places = "once, for the number of the layer" if count == 1 else "twice, for the numbers of stage and layer"
        raise ValueError(f"{name} must have {{}} in it {places}, as 'blocks.{{}}.*' has, got {value!r}")
    return value


def check_patterns(name: str, value: Any) -> None:
    """Raise for what is neither a pattern nor a list of patterns."""
    entries = (value,) if isinstance(value, str) else value
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, str) for entry in entries):
        raise TypeError(f"{name} must be a pattern or a list of patterns, got {value!r}")


def _factor(name: str, value: Any) -> float:
    factor = positive_number(name, value)
    if factor is None:
        raise TypeError(f"{name} must be a number above 0, got None")
    return factor
