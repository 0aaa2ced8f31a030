"""Conventions of other projects, by name, as rules in plain data. Knows no rule objects and no model.

Each function returns a list of rules as one would write them in YAML, to be used alone or after rules of one's own. In
all of them ``weight_decay`` is the λ (or the schedule) of what decays; without it, that keeps the optimizer's own, in
the group ``default``. All their rules are ``optional``: one that takes nothing in a model is no mistake. What a model
marks by ``parameter._no_weight_decay = True``, as Mamba and S4 do, does not decay, whether the convention knows of that
or not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from lightning_regdecay.rules.by_layer import PlainRules, layerwise_lr_rules, layerwise_rules
from lightning_regdecay.rules.by_part import attention_rules, embeddings_rules, gates_rules
from lightning_regdecay.rules.muon import EMBEDDINGS, muon_lr_rules, muon_rules
from lightning_regdecay.rules.names import hint
from lightning_regdecay.rules.scalars import number_of, true_or_false

__all__ = [
    "LR_PRESETS",
    "PRESETS",
    "attention_rules",
    "detectron2_rules",
    "dino_rules",
    "dinov2_rules",
    "embeddings_rules",
    "gates_rules",
    "layerwise_lr_rules",
    "layerwise_rules",
    "lightly_rules",
    "lightly_train_rules",
    "mmengine_rules",
    "muon_lr_rules",
    "muon_rules",
    "ndim_rules",
    "timm_rules",
    "transformers_examples_rules",
    "transformers_rules",
]

_BATCH_NORM = "torch.nn.modules.batchnorm._BatchNorm"
_NORM_BASE = "torch.nn.modules.batchnorm._NormBase"
_INSTANCE_NORM = "torch.nn.modules.instancenorm._InstanceNorm"
_GROUP_NORM, _LAYER_NORM = "torch.nn.GroupNorm", "torch.nn.LayerNorm"
_EVERY_NORM = "*Norm*"
"""Norm layers by the names of their classes and base classes, which finds those that no list of classes has."""

_TOKENS = (
    r"re:(cls|class|dist|mask|reg|register|storage)_tokens?|pos(ition(al)?)?_embed|rel(ative)?_pos|layer_?scale|gamma"
)
"""Tokens, position embeddings and layer scales of vision transformers."""


def ndim_rules(weight_decay: Any = None, *, embeddings: bool = True, marks: bool = True) -> PlainRules:
    """What has two or more dimensions decays, as in nanoGPT and most code for language models.

    Source: ``configure_optimizers`` in `nanoGPT <https://github.com/karpathy/nanoGPT/blob/master/model.py>`_.

    Args:
        weight_decay: λ of what decays.
        embeddings: False leaves out embedding tables, which the convention decays. Their norm then shrinks, and
            gradients grow in the layers after them (OLMo 2, `arXiv 2501.00656 <https://arxiv.org/abs/2501.00656>`_).
        marks: False to decay what the model has marked, by ``_no_weight_decay``, like the rest.

    >>> for rule in ndim_rules(0.1):
    ...     print(rule)
    {'max_ndim': 1, 'weight_decay': 0.0, 'group': 'no_decay', 'optional': True}
    {'where': 'marked', 'weight_decay': 0.0, 'group': 'no_decay', 'optional': True}
    {'weight_decay': 0.1, 'group': 'decay', 'optional': True}
    """
    tables = [] if true_or_false("embeddings", embeddings) else [{"modules": EMBEDDINGS}]
    return _rules({"max_ndim": 1}, *tables, weight_decay=weight_decay, marks=marks)


def timm_rules(weight_decay: Any = None, *, keywords: bool = False, marks: bool = True) -> PlainRules:
    """Biases, 1-D parameters and what the model lists in ``no_weight_decay()`` do not decay, as in timm, Swin and BEiT.

    The list is that of the outermost module that has one, with names (or globs) as seen from there, so a model that is
    part of a ``LightningModule`` is found too. timm asks only the model that it is given: it finds nothing where that
    is wrapped, and overlooks the list that EdgeNeXt has in its attention blocks only. Lists inside a model that has one
    itself do not count, there or here: the model puts them into its own.

    Source: ``param_groups_weight_decay`` in `timm
    <https://github.com/huggingface/pytorch-image-models/blob/main/timm/optim/_param_groups.py>`_,
    ``set_weight_decay`` in `Swin <https://github.com/microsoft/Swin-Transformer/blob/main/optimizer.py>`_,
    ``get_parameter_groups`` in `BEiT <https://github.com/microsoft/unilm/blob/master/beit/optim_factory.py>`_.

    Args:
        weight_decay: λ of what decays.
        keywords: True to leave out names with a part that the model lists in ``no_weight_decay_keywords()`` as well, as
            Swin does. timm does not ask for them, though its TinyViT lists some.
        marks: False to decay what the model has marked, by ``_no_weight_decay``, like the rest.
    """
    lists = ["no_weight_decay"] + ["no_weight_decay_keywords"] * true_or_false("keywords", keywords)
    return _rules(
        {"max_ndim": 1},
        {"params": "*.bias"},
        *({"where": name} for name in lists),
        weight_decay=weight_decay,
        marks=marks,
    )


def transformers_rules(weight_decay: Any = None, *, all_norms: bool = False, marks: bool = True) -> PlainRules:
    """``nn.LayerNorm`` and names with "bias" or a word for a norm do not decay, as in transformers' ``Trainer``.

    Source: ``Trainer.get_decay_parameter_names`` in `transformers 5
    <https://github.com/huggingface/transformers/blob/main/src/transformers/trainer.py>`_.

    Args:
        weight_decay: λ of what decays.
        all_norms: True for norm layers of every class. The convention misses those that are no ``nn.LayerNorm`` and
            have no norm in their name: ``bn1``, ``ln_f``, ``normalization``, a norm in a ``Sequential``.
        marks: False to decay what the model has marked, by ``_no_weight_decay``, like the rest.
    """
    names = r"re:(?i)bias|layernorm|rmsnorm|(^|\.)norm($|\.)|_norm($|\.)"
    return _rules(
        {"params": names}, {"modules": _norms([_LAYER_NORM], all_norms)}, weight_decay=weight_decay, marks=marks
    )


def transformers_examples_rules(weight_decay: Any = None, *, all_norms: bool = False, marks: bool = True) -> PlainRules:
    """Names with "bias" or "LayerNorm.weight" in them do not decay, as in transformers' examples without a ``Trainer``.

    Source: ``run_glue_no_trainer.py`` in `transformers' examples
    <https://github.com/huggingface/transformers/tree/main/examples/pytorch/text-classification>`_, and much code after
    it.

    Args:
        weight_decay: λ of what decays.
        all_norms: True for norm layers of every class and name. The convention finds those of BERT and its kin only
            (`transformers issue 42754 <https://github.com/huggingface/transformers/issues/42754>`_).
        marks: False to decay what the model has marked, by ``_no_weight_decay``, like the rest.
    """
    norms = [{"modules": _EVERY_NORM}] if true_or_false("all_norms", all_norms) else []
    return _rules({"params": ["*bias*", "*LayerNorm.weight*"]}, *norms, weight_decay=weight_decay, marks=marks)


def detectron2_rules(
    weight_decay: Any = None,
    *,
    norm: Any = 0.0,
    bias: Any = None,
    all_norms: bool = False,
    marks: bool = True,
) -> PlainRules:
    """Norms and biases have a λ of their own, and a norm's bias that of the biases, as in detectron2.

    Source: ``get_default_optimizer_params`` in `detectron2
    <https://github.com/facebookresearch/detectron2/blob/main/detectron2/solver/build.py>`_.

    Args:
        weight_decay: λ of the rest, ``SOLVER.WEIGHT_DECAY``.
        norm: λ of norms, ``SOLVER.WEIGHT_DECAY_NORM``; None for that of the rest.
        bias: λ of biases, ``SOLVER.WEIGHT_DECAY_BIAS``; None for no difference.
        all_norms: True for norm layers of every class. The convention knows torch's own, and misses every RMSNorm and
            LayerNorm that a model defines itself.
        marks: False to decay what the model has marked, by ``_no_weight_decay``, like the rest.
    """
    return [
        *_marked(marks),
        *_rule("bias", bias, params=r"re:(^|\.)bias$"),
        *_rule("norm", norm, modules=_norms([_BATCH_NORM, _INSTANCE_NORM, _GROUP_NORM, _LAYER_NORM], all_norms)),
        *_rule("decay", weight_decay),
    ]


def mmengine_rules(
    weight_decay: Any = None,
    *,
    norm: Any = None,
    bias: Any = None,
    depthwise: Any = None,
    flat: Any = None,
    all_norms: bool = False,
    marks: bool = True,
) -> PlainRules:
    """Norms, biases, depthwise convolutions and 1-D parameters have a λ of their own, as in mmengine.

    In this order, so a norm's bias is with the norms. Where mmengine has factors (``norm_decay_mult=0.5``), these are
    the λ themselves, and None stands for that of the rest, or of a later kind. A convolution counts as depthwise where
    it has as many groups as input channels, one of one included. Without mmcv's deformable convolutions.

    Source: ``DefaultOptimWrapperConstructor`` in `mmengine
    <https://github.com/open-mmlab/mmengine/blob/main/mmengine/optim/optimizer/default_constructor.py>`_.

    Args:
        weight_decay: λ of the rest.
        norm: λ of norms, for ``norm_decay_mult``.
        bias: λ of biases, for ``bias_decay_mult``.
        depthwise: λ of depthwise ``Conv2d``, for ``dwconv_decay_mult``.
        flat: λ of other 1-D parameters, for ``flat_decay_mult``.
        all_norms: True for norm layers of every class. The convention knows torch's own, and misses every RMSNorm and
            LayerNorm that a model defines itself.
        marks: False to decay what the model has marked, by ``_no_weight_decay``, like the rest.
    """
    return [
        *_marked(marks),
        *_rule("norm", norm, modules=_norms([_BATCH_NORM, _INSTANCE_NORM, _GROUP_NORM, _LAYER_NORM], all_norms)),
        *_rule("bias", bias, params=r"re:(^|\.)bias$"),
        *_rule("depthwise", depthwise, modules="torch.nn.Conv2d", where="depthwise"),
        *_rule("flat", flat, min_ndim=1, max_ndim=1),
        *_rule("decay", weight_decay),
    ]


def dino_rules(weight_decay: Any = None, *, tokens: bool = True, marks: bool = True) -> PlainRules:
    """Biases and 1-D parameters do not decay, as in DINO.

    Source: ``get_params_groups`` in `DINO <https://github.com/facebookresearch/dino/blob/main/utils.py>`_.

    Args:
        weight_decay: λ of what decays; in DINO it grows, ``{"schedule": "cosine", "start": 0.04, "end": 0.4}``.
        tokens: False leaves out tokens, position embeddings and layer scales, which the convention decays where they
            have two or more dimensions.
        marks: False to decay what the model has marked, by ``_no_weight_decay``, like the rest.
    """
    return _rules(
        {"min_ndim": 1, "max_ndim": 1},
        {"params": "*.bias"},
        *_token_rules(tokens),
        weight_decay=weight_decay,
        marks=marks,
    )


def dinov2_rules(
    weight_decay: Any = None, *, tokens: bool = True, all_norms: bool = False, marks: bool = True
) -> PlainRules:
    """Biases and names with "norm" or "gamma" (layer scale) in them do not decay, as in DINOv2.

    Without its factors on the lr. Source: ``get_params_groups_with_decay`` in `DINOv2
    <https://github.com/facebookresearch/dinov2/blob/main/dinov2/utils/param_groups.py>`_.

    Args:
        weight_decay: λ of what decays; in DINOv2 it grows, ``{"schedule": "cosine", "start": 0.04, "end": 0.2}``.
        tokens: False leaves out tokens, position embeddings and all layer scales, which the convention decays.
        all_norms: True for norm layers of every name. The convention misses those without "norm" in theirs.
        marks: False to decay what the model has marked, by ``_no_weight_decay``, like the rest.
    """
    norms = [{"modules": _EVERY_NORM}] if true_or_false("all_norms", all_norms) else []
    names = {"params": ["*.bias", "*norm*", "*gamma*"]}
    return _rules(names, *norms, *_token_rules(tokens), weight_decay=weight_decay, marks=marks)


def lightly_rules(
    weight_decay: Any = None, *, tokens: bool = True, all_norms: bool = False, marks: bool = True
) -> PlainRules:
    """Biases and torch's norm layers do not decay, as in lightly.

    Source: ``get_weight_decay_parameters`` in `lightly
    <https://github.com/lightly-ai/lightly/blob/master/lightly/models/utils.py>`_.

    Args:
        weight_decay: λ of what decays.
        tokens: False leaves out tokens, position embeddings and layer scales, which the convention decays.
        all_norms: True for norm layers of every class. The convention misses those that a model defines itself.
        marks: False to decay what the model has marked, by ``_no_weight_decay``, like the rest.
    """
    norms = {"modules": _norms([_NORM_BASE, _GROUP_NORM, _LAYER_NORM], all_norms)}
    return _rules({"params": "*bias"}, norms, *_token_rules(tokens), weight_decay=weight_decay, marks=marks)


def lightly_train_rules(weight_decay: Any = None, *, query_projections: bool = False, marks: bool = True) -> PlainRules:
    """Biases, 1-D parameters, norms, embeddings, tokens, queries and scales do not decay, as in LightlyTrain.

    Source: ``get_weight_decay_parameters`` in `LightlyTrain
    <https://github.com/lightly-ai/lightly-train/blob/main/src/lightly_train/_optim/optimizer_helpers.py>`_.

    Args:
        weight_decay: λ of what decays.
        query_projections: True to decay linear layers with "query" in their name. The convention means learned queries,
            and leaves out the matrices that project onto queries in every attention of transformers' models too.
        marks: False to decay what the model has marked, by ``_no_weight_decay``, like the rest.
    """
    projections = (
        [{"decay_mult": 1.0} if weight_decay is None else {"weight_decay": weight_decay}]
        if true_or_false("query_projections", query_projections)
        else []
    )
    linear = {"modules": "torch.nn.Linear", "params": ["*query.weight", "*queries.weight"], "min_ndim": 2}
    words = "bias|bias_v|bias_k|logit_scale|temperature|tau|layer_scale|layerscale|res_scale|rezero|gamma"
    parts = (
        "cls_token|mask_token|storage_token|register_token|queries|query|pos_embed|position_embedding|"
        "positional_embedding|relative_position|relative_pos|rel_pos|rpb|bias_table"
    )
    return [
        *({**linear, **strength, "group": "decay", "optional": True} for strength in projections),
        *_rules(
            {"max_ndim": 1},
            {"modules": [_NORM_BASE, _GROUP_NORM, _LAYER_NORM, _EVERY_NORM]},
            {"modules": EMBEDDINGS},
            {"params": [rf"re:(^|\.)({words})(\.|$)", f"re:{parts}"]},
            weight_decay=weight_decay,
            marks=marks,
        ),
    ]


PRESETS: dict[str, Callable[..., PlainRules]] = {
    "ndim": ndim_rules,
    "timm": timm_rules,
    "transformers": transformers_rules,
    "transformers_examples": transformers_examples_rules,
    "detectron2": detectron2_rules,
    "mmengine": mmengine_rules,
    "dino": dino_rules,
    "dinov2": dinov2_rules,
    "lightly": lightly_rules,
    "lightly_train": lightly_train_rules,
    "layerwise": layerwise_rules,
    "muon": muon_rules,
    "attention": attention_rules,
    "gates": gates_rules,
    "embeddings": embeddings_rules,
}
"""The presets by the names that they have in plain data."""
LR_PRESETS: dict[str, Callable[..., PlainRules]] = {
    "layerwise": layerwise_lr_rules,
    "muon": muon_lr_rules,
}
"""Those for lr rules."""


def is_preset(value: Any) -> bool:
    """Whether a value is a preset by name, with its arguments; ``{"preset": 0.1}`` is a pattern and its λ."""
    name = value.get("preset") if isinstance(value, Mapping) else None
    return isinstance(name, str) and number_of(name) is None


def preset_rules(given: Mapping[str, Any], presets: Mapping[str, Callable[..., PlainRules]] = PRESETS) -> PlainRules:
    """The rules that a preset by name stands for.

    Args:
        given: its name and its arguments.
        presets: those that there are.

    Raises:
        ValueError: for a name that no preset has.
        TypeError: for an argument that the preset does not have.

    >>> preset_rules({"preset": "dino", "weight_decay": 0.04}) == dino_rules(0.04)
    True
    """
    arguments = dict(given)
    name = arguments.pop("preset")
    if name not in presets:
        raise ValueError(f"unknown preset {name!r}; {hint(name, presets)}")
    known = inspect.signature(presets[name]).parameters
    for argument in arguments:
        if argument not in known:
            advice = f"; rules beside a preset go into a list with it, and {name!r} alone takes the place of all rules"
            advice = "" if str(argument).isidentifier() else advice
            raise TypeError(f"preset {name!r} has no argument {argument!r}; {hint(str(argument), known)}{advice}")
    missing = [name for name, one in known.items() if one.default is one.empty and name not in arguments]
    if missing:
        raise TypeError(f"preset {name!r} needs {', '.join(missing)}")
    return presets[name](**arguments)


def _marked(marks: bool) -> PlainRules:
    """What the model has marked does not decay."""
    return _rule("no_decay", 0.0, where="marked") if true_or_false("marks", marks) else []


def _rules(*selectors: dict[str, Any], weight_decay: Any, marks: bool) -> PlainRules:
    """What does not decay, by any of some selectors, and the rest, which does."""
    without = [rule for selector in selectors for rule in _rule("no_decay", 0.0, **selector)]
    return [*without, *_marked(marks), *_rule("decay", weight_decay)]


def _rule(group: str, weight_decay: Any, **selector: Any) -> PlainRules:
    """One rule, or none where the group has no λ of its own."""
    fields = {**selector, "weight_decay": weight_decay, "group": group, "optional": True}
    return [] if weight_decay is None else [fields]


def _norms(classes: list[str], all_norms: bool) -> list[str]:
    return [*classes, _EVERY_NORM] if true_or_false("all_norms", all_norms) else classes


def _token_rules(decay: bool) -> PlainRules:
    return [] if true_or_false("tokens", decay) else [{"params": _TOKENS}]
